"""The health panel: what could make the numbers of a report worth less than they look."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rankwise.report.views import Check, ProfileView, Report, RunView, UpdateView
from rankwise.report.words import joined, seeds_of, whole

_PRECISE = ("float32", "float64")


def health(report: Report) -> list[Check]:
    """One check a line, in the order of the report."""
    checks = [check for profile in report.profiles for check in _profile(profile)]
    checks += [check for run in report.runs for check in _run(run)]
    checks += [check for update in report.updates for check in _update(update)]
    return checks + _together(report)


def _profile(profile: ProfileView) -> list[Check]:
    return [*_batches(profile), *_modules(profile), *_circumstances(profile), _settled(profile)]


def _batches(profile: ProfileView) -> list[Check]:
    p = profile.provenance
    seen = p["batches"] + len(p["dropped_batches"]) + len(p["unlabelled_batches"])
    return [
        Check(
            profile.label,
            "dropped batches",
            f"{len(p['dropped_batches'])} of {seen}",
            not p["dropped_batches"],
            "A batch with a NaN or an infinity counts for no module.",
        ),
        Check(
            profile.label,
            "batches without a label",
            f"{len(p['unlabelled_batches'])} of {seen}",
            not p["unlabelled_batches"],
            "They have no loss, so they are left out.",
        ),
    ]


def _modules(profile: ProfileView) -> list[Check]:
    modules, batches = profile.modules.values(), profile.provenance["batches"]
    without = sum(module.gradient_norm == 0 for module in modules)
    partly = sum(
        module.gradient_norm > 0 and module.batches - module.zero_batches < batches
        for module in modules
    )
    return [
        Check(
            profile.label,
            "modules without gradient",
            f"{without} of {len(modules)}",
            not without,
            "No batch reached them (an unused expert, a frozen path): they cannot be planned from.",
        ),
        Check(
            profile.label,
            "modules that some batches missed",
            f"{partly} of {len(modules)}",
            not partly,
            "Their mean gradient holds zeros for those batches.",
        ),
    ]


def _circumstances(profile: ProfileView) -> list[Check]:
    p = profile.provenance
    return [
        Check(
            profile.label,
            "dtype of the model",
            str(p["dtype"]),
            p["dtype"] in _PRECISE,
            "Half precision rounds small gradients away, which moves GID; compare only profiles "
            "of one dtype.",
        ),
        Check(
            profile.label,
            "dropout while measuring",
            "on" if p["train_mode"] else "off",
            not p["train_mode"],
            "On, it adds noise to every gradient.",
        ),
    ]


def _settled(profile: ProfileView) -> Check:
    curve, what = profile.convergence, "enough batches"
    if curve is None:
        remedy = "rankwise profile --statistics convergence measures it."
        return Check(profile.label, what, "not measured", None, remedy)
    verdict = curve.verdict[:1].upper() + curve.verdict[1:] + "."
    found = "yes" if curve.settled else "profile more"
    return Check(profile.label, what, found, curve.settled, verdict)


def _run(run: RunView) -> list[Check]:
    return [
        Check(run.label, "seed", str(run.seed), None, "Data order, adapters and dropout."),
        Check(
            run.label,
            "commit",
            run.commit or "none",
            None if run.commit is None else not run.commit.endswith("-dirty"),
            "The code that the run was started from; -dirty means that it had uncommitted changes.",
        ),
    ]


def _update(update: UpdateView) -> list[Check]:
    idle = sum(module.update_norm == 0 for module in update.modules.values())
    return [
        Check(
            update.label,
            "updates of exactly zero",
            f"{idle} of {len(update.modules)}",
            not idle,
            "Training never moved them.",
        ),
        Check(
            update.label,
            "tensors that are no update",
            str(update.other_tensors),
            None,
            "Trained heads or other parts of the adapter that this page does not show.",
        ),
    ]


def _together(report: Report) -> list[Check]:
    """What has to be the same for the parts of a report to be compared."""
    return [*_base_models(report), *_packages(report), *_seeds(report)]


def _base_models(report: Report) -> list[Check]:
    prints = [str(profile.provenance["model_fingerprint"]) for profile in report.profiles]
    prints += [run.model_fingerprint for run in report.runs]
    prints += [plan.model_fingerprint for plan in report.plans if plan.model_fingerprint]
    if len(prints) < 2:
        return []
    distinct = len(set(prints))
    return [
        Check(
            "together",
            "base models",
            "the same" if distinct == 1 else f"{distinct} different",
            distinct == 1,
            "Fingerprints of structure and weights; different models' numbers do not compare.",
        )
    ]


def _packages(report: Report) -> list[Check]:
    sets: list[Mapping[str, str]] = [
        *(run.versions for run in report.runs),
        *(profile.provenance["versions"] for profile in report.profiles),
    ]
    if not sets:
        return []
    uneven = _uneven(sets)
    return [
        Check(
            "together",
            "package versions",
            f"{joined(uneven)} differ" if uneven else _versions(sets[0]),
            not uneven,
            "Versions that the numbers came from.",
        )
    ]


def _seeds(report: Report) -> list[Check]:
    if len(report.runs) < 2:
        return []
    seeds = sorted({run.seed for run in report.runs})
    fewest = min(seeds_of(report.runs, run.method) for run in report.runs)
    return [
        Check(
            "together",
            "seeds",
            joined([whole(seed) for seed in seeds]),
            fewest > 1,
            "A difference between methods needs several seeds each to mean anything.",
        )
    ]


def _uneven(sets: Iterable[Mapping[str, str]]) -> list[str]:
    """Packages of which the sets name more than one version."""
    found: dict[str, set[str]] = {}
    for versions in sets:
        for package, version in versions.items():
            found.setdefault(package, set()).add(version)
    return sorted(package for package, known in found.items() if len(known) > 1)


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())
