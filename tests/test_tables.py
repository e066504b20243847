from __future__ import annotations

from rankwise.tables import layer_table, make_table, render


def test_layers_are_in_order_whatever_order_they_come_in() -> None:
    cells = {f"model.layers.{i}.q": str(i) for i in (0, 1, 10, 2, 9)}
    lines = layer_table(cells, title="t", caption="c").splitlines()
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == [
        "0", "1", "2", "9", "10",
    ]  # fmt: skip


def test_two_stacks_keep_their_order() -> None:
    cells = {"encoder.0.q": "a", "decoder.1.q": "b", "decoder.0.q": "c", "head": "d"}
    text = layer_table(cells, title="title", caption="caption")
    positions = [text.index(part) for part in ("encoder.0", "decoder.0", "decoder.1", "head")]
    assert positions == sorted(positions)
    assert text.startswith("title") and text.endswith("caption")


def test_names_are_no_markup() -> None:
    row = ["[bold]q", "m[/x]"]
    text = render(make_table(["[red]", ":smile:"], [row], title="[/y]", caption="[z]"))
    assert all(part in text for part in (*row, "[red]", ":smile:", "[/y]", "[z]"))
