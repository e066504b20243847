"""CLIP's vision tower as an image classifier whose classes are prompts."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPVisionModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel


class ClipForPrompts(CLIPPreTrainedModel):
    """Class scores of an image: `exp(t) cos(v(image), p_c)` (Radford et al. 2021, section 2.3).

    `v` is the projected vision tower, `p_c` the text features of the prompt of class c, and t
    CLIP's own logarithmic scale. Loads from CLIP's weights; its text tower is left out.
    """

    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_unexpected = [r"^text_"]  # noqa: RUF012 - as transformers declares it
    prompts: Tensor

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        width: Any = config.projection_dim
        self.vision_model = CLIPVisionModel._from_config(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.register_buffer("prompts", torch.zeros(0, width), persistent=False)
        self.post_init()

    def set_prompts(self, features: Float[Tensor, "classes d"]) -> None:
        """Say what the classes are: the text features of their prompts, of any length."""
        self.prompts = F.normalize(features, dim=-1).to(self.prompts)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Scores of each class, and the cross entropy of labels where they are given."""
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        features = F.normalize(self.visual_projection(pooled), dim=-1)
        logits = self.logit_scale.exp() * features @ self.prompts.T
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
