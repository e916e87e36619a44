"""The CLIP vision tower, and its dense pre-training on scenes whose content is known.

A patch transformer that is trained from scratch through a language model's loss alone learns to classify but not to
localise. Supervising every patch first (what lies under it, and that object's box) makes features a projector can read.
Shapes: B images, N patches, H features.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, CLIPVisionModel

from geodistill.config import VisionConfig
from geodistill.data import synthetic
from geodistill.data.files import local
from geodistill.data.record import CLIP_MEAN, CLIP_STD
from geodistill.language import Box, box_corners
from geodistill.models.earthgpt import VitConvNetConfig, VitConvNetModel, new_vit_convnet


def new_tower(sizes: VisionConfig) -> CLIPVisionModel | VitConvNetModel:
    """A vision tower with random weights: CLIP's, or EarthGPT's where `sizes.conv_widths` names a ConvNet."""
    vit = CLIPVisionConfig(
        hidden_size=sizes.hidden,
        intermediate_size=4 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch,
        projection_dim=sizes.hidden,
    )
    if sizes.conv_widths:
        return new_vit_convnet(vit, sizes.conv_widths, sizes.conv_depths, sizes.vit_layers)
    return CLIPVisionModel(vit)


def normalize(images_BHWC: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] with CLIP's mean and deviation."""
    mean = torch.tensor(CLIP_MEAN, device=images_BHWC.device)
    std = torch.tensor(CLIP_STD, device=images_BHWC.device)
    return ((images_BHWC.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


class DenseHeads(nn.Module):
    """Linear read-outs of the patch features: object under the patch, its attributes and box, and the whole scene."""

    BINS = 101

    def __init__(self, hidden: int):
        super().__init__()
        self.widths = {
            "kind": len(synthetic.KINDS) + 1,
            "color": len(synthetic.COLORS) + 1,
            "large": 2,
            "theta": 12,
            **{side: self.BINS for side in ("x1", "y1", "x2", "y2")},
        }
        self.patch = nn.Linear(hidden, sum(self.widths.values()))
        self.scene_widths = {"scene": len(synthetic.SCENES), "flooded": 2, "sensor": len(synthetic.SENSOR_SHARES)}
        self.scene = nn.Linear(hidden, sum(self.scene_widths.values()))

    def loss(self, features_BNH: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Sum of the cross-entropies and the accuracy of each read-out. Box sides use a Gaussian of one percent."""
        metrics: dict[str, float] = {}
        total = features_BNH.new_zeros(())
        patch = dict(zip(self.widths, self.patch(features_BNH).float().split(list(self.widths.values()), -1), strict=True))
        on_object = targets["kind"] > 0
        for name, logits in patch.items():
            chosen = torch.ones_like(on_object) if name == "kind" else on_object
            logits, target = logits[chosen], targets[name][chosen]
            if name in ("x1", "y1", "x2", "y2"):
                bins = torch.arange(self.BINS, device=logits.device)
                soft = torch.softmax(-0.5 * (bins - target[:, None].float()) ** 2, dim=-1)
                total = total + 0.5 * F.cross_entropy(logits, soft)
                metrics[name] = (logits.argmax(-1) - target).abs().float().mean().item()
            else:
                total = total + F.cross_entropy(logits, target)
                metrics[name] = (logits.argmax(-1) == target).float().mean().item()
        pooled = self.scene(features_BNH.mean(1)).float().split(list(self.scene_widths.values()), -1)
        for name, logits in zip(self.scene_widths, pooled, strict=True):
            total = total + F.cross_entropy(logits, targets[name])
            metrics[name] = (logits.argmax(-1) == targets[name]).float().mean().item()
        return total, metrics


def _inside(box: Box, points_N2: np.ndarray) -> np.ndarray:
    corners = np.array(box_corners(box, synthetic.SIZE, synthetic.SIZE))
    edges = np.roll(corners, -1, axis=0) - corners
    offsets = points_N2[:, None, :] - corners[None]
    cross = edges[None, :, 0] * offsets[..., 1] - edges[None, :, 1] * offsets[..., 0]
    return np.all(cross >= 0, axis=1) | np.all(cross <= 0, axis=1)


def dense_targets(scene: synthetic.Scene, patches: int) -> dict[str, np.ndarray]:
    """What each of patches x patches patches shows: class numbers [N] (0 = nothing), box sides in percent, and the scene."""
    step = synthetic.SIZE / patches
    ys, xs = np.divmod(np.arange(patches * patches), patches)
    centers = np.stack([(xs + 0.5) * step, (ys + 0.5) * step], axis=1)
    found = {name: np.zeros(patches * patches, np.int64) for name in ("kind", "color", "large", "theta", "x1", "y1", "x2", "y2")}
    for thing in scene.things:
        box = thing.box
        inside = _inside(box, centers)
        found["kind"][inside] = 1 + list(synthetic.KINDS).index(thing.kind)
        found["color"][inside] = 1 + list(synthetic.COLORS).index(thing.color) if thing.color else 0
        found["large"][inside] = int(thing.large)
        found["theta"][inside] = thing.theta // 15
        for side in ("x1", "y1", "x2", "y2"):
            found[side][inside] = min(max(getattr(box, side), 0), 100)
    found["scene"] = np.array(list(synthetic.SCENES).index(scene.name))
    found["flooded"] = np.array(int(scene.flooded))
    found["sensor"] = np.array(list(synthetic.SENSOR_SHARES).index(scene.sensor))
    return found


def pretrain_tower(
    tower: CLIPVisionModel | VitConvNetModel,
    images: int,
    steps: int,
    batch: int = 64,
    learning_rate: float = 1e-3,
    feature_layer: int = -2,
    seed: int = 1000,
    report: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train `tower` in place on `images` generated scenes (seed kept apart from any data set); return the last metrics.

    Only the layers up to `feature_layer` take part; the ones above stay as they were.
    """
    patches = tower.config.image_size // tower.config.patch_size
    pixels = np.empty((images, tower.config.image_size, tower.config.image_size, 3), np.uint8)
    rows = []
    for i in range(images):
        scene, image, _ = synthetic.make_scene(seed, "train", i)
        pixels[i] = np.asarray(image.resize(pixels.shape[1:3], Image.Resampling.BICUBIC))
        rows.append(dense_targets(scene, patches))
    targets = {name: torch.from_numpy(np.stack([r[name] for r in rows])) for name in rows[0]}
    data = torch.from_numpy(pixels)
    heads = DenseHeads(tower.config.hidden_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(images, generator=generator)
    metrics: dict[str, float] = {}
    started, at = time.time(), 0
    for step in range(steps):
        if at + batch > images:
            order, at = torch.randperm(images, generator=generator), 0
        chosen, at = order[at : at + batch], at + batch
        features = tower(pixel_values=normalize(data[chosen]), output_hidden_states=True).hidden_states[feature_layer][:, 1:]
        loss, metrics = heads.loss(features, {name: t[chosen] for name, t in targets.items()})
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            rate = (step + 1) / (time.time() - started)
            shown = " ".join(f"{k} {v:.2f}" for k, v in metrics.items())
            left = (steps - step - 1) / rate
            report(f"tower step {step + 1}/{steps} loss {loss.item():.2f} {shown} ({rate:.1f} steps/s, {left:.0f} s left)")
    return metrics


def load_tower(folder: str | Path) -> tuple[CLIPVisionModel | VitConvNetModel, int | None]:
    """The tower of a folder that holds a CLIP or EarthGPT tower or a whole LLaVA, and the layer to read where it is known.

    Raises ValueError where there is none.
    """
    here = local(folder)
    file = here / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no model (config.json is missing); correct model.tower")
    kind = json.loads(file.read_text())["model_type"]
    if kind == "llava":
        model = AutoModelForImageTextToText.from_pretrained(here, dtype=torch.float32)
        return model.model.vision_tower, model.config.vision_feature_layer
    if kind == VitConvNetConfig.model_type:
        return VitConvNetModel.from_pretrained(here, dtype=torch.float32), -1
    return CLIPVisionModel.from_pretrained(here, dtype=torch.float32), None
