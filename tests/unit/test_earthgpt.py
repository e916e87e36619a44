"""EarthGPT's tower: its parts are transformers' own, lie over each other, and LLaVA reads them."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from geodistill.models.earthgpt import VitConvNetConfig, VitConvNetModel, alignment, new_vit_convnet
from geodistill.models.pair import image_reading
from geodistill.models.row_model import RowModel
from geodistill.models.vision import pretrain_tower

SIDE, PATCH, GRID = 64, 8, 8
VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
WIDTHS, DEPTHS = [8, 12, 20], [1, 1, 2]
CONVNEXT = ConvNextConfig(num_stages=3, hidden_sizes=WIDTHS, depths=DEPTHS)
LAYERS = [3, -4]  # hidden states 3 and 1 of 0 to 4
PARTS = [16, 16, *WIDTHS]  # channels, in order


def clip(**sizes) -> CLIPVisionConfig:
    return CLIPVisionConfig(**{**VIT, "intermediate_size": 32, "projection_dim": 16, **sizes})


def noisy(model):
    """The model with weights large enough that every layer changes what passes through it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def tower() -> VitConvNetModel:
    torch.manual_seed(0)
    return noisy(new_vit_convnet(clip(), WIDTHS, DEPTHS, LAYERS))


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def llava(tower: VitConvNetModel) -> LlavaForConditionalGeneration:
    text = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(vision_config=tower.config, text_config=text, image_token_index=3, vision_feature_layer=-1)
    config._attn_implementation = "sdpa"
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model


IDS = torch.tensor([[1, *[3] * GRID**2, 5, 6, 7]] * 2)


def standard(part: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over the channels, written out."""
    part = part.double()
    return (part - part.mean(-1, keepdim=True)) / (part.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def test_every_part_is_what_transformers_own_models_give(tower, pixels) -> None:
    vit, convnet = CLIPVisionModel(tower.config.vit_config).eval(), ConvNextModel(tower.config.convnet_config).eval()
    vit.load_state_dict(tower.vit.state_dict())
    convnet.load_state_dict(tower.convnet.state_dict())
    layers = vit(pixels, output_hidden_states=True).hidden_states
    maps = convnet(pixels, output_hidden_states=True).hidden_states[1:]
    assert [m.shape[-1] for m in maps] == [16, 8, 4]  # finer than the patches, as fine, coarser
    laid = [F.interpolate(m, (GRID, GRID), mode="bilinear", antialias=True) for m in maps]
    patches = [layers[3][:, 1:], layers[1][:, 1:], *(m.permute(0, 2, 3, 1).reshape(2, GRID**2, -1) for m in laid)]
    whole = [layers[3][:, 0], layers[1][:, 0], *(m.mean((2, 3)) for m in maps)]

    output = tower(pixels)
    assert output.last_hidden_state.shape == (2, 1 + GRID**2, sum(PARTS)) and tower.config.hidden_size == sum(PARTS)
    found = output.last_hidden_state.double()
    assert torch.allclose(found[:, 1:], torch.cat([standard(p) for p in patches], -1), atol=1e-4)
    assert torch.allclose(found[:, 0], torch.cat([standard(p) for p in whole], -1), atol=1e-4)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    assert len(output.hidden_states) == 1 and output.hidden_states[-1] is output.last_hidden_state
    assert tower(pixels, return_dict=False)[0].equal(output.last_hidden_state)  # and it is deterministic


@pytest.mark.parametrize(("patches", "patch", "stride"), [(8, 8, 4), (8, 8, 8), (8, 8, 32), (32, 14, 4), (32, 14, 28)])
def test_a_map_without_dropped_border_is_laid_over_the_patches_as_torch_does(patches, patch, stride) -> None:
    cells = patches * patch // stride
    weights = alignment(patches, patch, cells, stride)
    wanted = F.interpolate(torch.eye(cells)[None, :, None], (1, patches), mode="bilinear", antialias=True)[0, :, 0].T
    assert weights.shape == (patches, cells) and torch.allclose(weights, wanted, atol=1e-6)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_a_map_stays_in_place_although_the_convnet_drops_a_border(stride) -> None:
    cells = 504 // stride  # 504 pixels are 36 patches of 14, but no whole number of cells of 16 or 32
    weights = alignment(36, 14, cells, stride)
    assert torch.allclose(weights.sum(1), torch.ones(36)) and (weights >= 0).all()
    center = (torch.arange(36) + 0.5) * 14
    seen = weights @ ((torch.arange(cells) + 0.5) * stride)
    inner = (center >= stride) & (center <= (cells - 1) * stride)
    assert (seen - center)[inner].abs().max() < (1e-3 if stride > 14 else 1.5)  # pixels
    assert seen[-1] == (cells - 0.5) * stride or stride == 8


def test_what_lies_in_a_corner_is_seen_by_the_tokens_of_that_corner(tower, pixels) -> None:
    other = pixels.clone()
    other[:, :, : SIDE // 2, : SIDE // 2] = 0
    change = (tower(other).last_hidden_state - tower(pixels).last_hidden_state)[:, 1:].abs()
    for part in change.split(PARTS, -1):
        rows = part.mean((0, 2)).view(2, GRID // 2, 2, GRID // 2).mean((1, 3))  # by quadrant
        assert rows.argmax() == 0 and rows[0, 0] > 1.3 * rows.flatten()[1:].max()
    finest = change.split(PARTS, -1)[2].amax((0, 2)).view(GRID, GRID)
    assert finest[:4, :4].min() > 0 and finest[6:].max() == 0 and finest[:, 6:].max() == 0  # one block sees 7 cells across
    down = pixels.clone()
    down[:, :, SIDE // 2 :, : SIDE // 2] = 0  # rows come before columns
    change = (tower(down).last_hidden_state - tower(pixels).last_hidden_state)[:, 1:].abs()
    assert all(part.mean((0, 2)).view(2, 4, 2, 4).mean((1, 3)).argmax() == 2 for part in change.split(PARTS, -1))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # its successor is newer than 5.0
def test_both_parts_learn_and_checkpointing_changes_no_gradient(tower, pixels) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        tower.zero_grad()
        (tower.train()(pixels).last_hidden_state[:, 1:] * wanted).sum().backward()
        return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}

    wanted = torch.randn(2, GRID**2, sum(PARTS))
    plain = gradients()
    unread = {name for name, _ in tower.named_parameters()} - set(plain)
    assert all(name.startswith(("vit.encoder.layers.3.", "vit.post_layernorm.", "convnet.layernorm.")) for name in unread)
    assert all(g.abs().max() > 0 for name, g in plain.items() if "k_proj.bias" not in name)
    tower.gradient_checkpointing_enable()
    assert sum(getattr(module, "gradient_checkpointing", False) for module in tower.modules()) >= 4  # the ViT's layers
    again = gradients()
    assert again.keys() == plain.keys() and all(torch.allclose(again[k], plain[k], atol=1e-5) for k in plain)


def test_a_saved_tower_comes_back_from_its_folder(tower, pixels, tmp_path) -> None:
    tower.save_pretrained(tmp_path)
    found, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(found, VitConvNetModel) and not any(info.values())
    assert found(pixels).last_hidden_state.equal(tower(pixels).last_hidden_state)
    assert image_reading(tmp_path) == {"model_type": "llava", "image_size": SIDE, "patch_size": PATCH}
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.image_size, config.patch_size, config.num_channels, config.hidden_size) == (SIDE, PATCH, 3, sum(PARTS))
    assert (config.vit_layers, config.conv_stages) == (LAYERS, [1, 2, 3])


def test_plain_llava_reads_it_and_comes_back_from_its_folder(tower, pixels, tmp_path) -> None:
    model = llava(tower)
    logits = model(input_ids=IDS, pixel_values=pixels).logits
    assert not torch.allclose(logits, model(input_ids=IDS, pixel_values=-pixels).logits)
    seen = model.model.multi_modal_projector(tower(pixels).last_hidden_state[:, 1:])
    embeds = model.get_input_embeddings()(IDS)
    embeds[:, 1 : 1 + GRID**2] = seen
    assert torch.allclose(logits, model(inputs_embeds=embeds).logits, atol=1e-5)
    assert model.generate(input_ids=IDS, pixel_values=pixels, max_new_tokens=3, do_sample=False).shape == (2, IDS.shape[1] + 3)

    model.save_pretrained(tmp_path)
    found, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(info.values()) and isinstance(found.model.vision_tower, VitConvNetModel)
    assert found.model.vision_tower.vit.config._attn_implementation == "sdpa"
    assert found(input_ids=IDS, pixel_values=pixels).logits.equal(logits)
    assert image_reading(tmp_path) == {"model_type": "llava", "image_size": SIDE, "patch_size": PATCH}


def test_image_rows_read_it_as_they_read_a_clip_tower(tower, pixels) -> None:
    model = llava(tower)
    rows = RowModel(model)
    features = rows.see(pixels)
    assert features.equal(tower(pixels).last_hidden_state[:, 1:]) and not features.requires_grad
    assert torch.stack(list(model.get_image_features(pixels).pooler_output)).equal(rows.project(features))


def test_bf16_gives_what_float32_gives_to_its_precision(tower, pixels) -> None:
    exact = tower(pixels).last_hidden_state
    found = tower.to(torch.bfloat16)(pixels).last_hidden_state  # pixels are cast as CLIP casts them
    assert found.dtype == torch.bfloat16 and F.cosine_similarity(found.float(), exact, dim=-1).min() > 0.995


def test_dense_pretraining_improves_it_as_it_does_a_clip_tower() -> None:
    torch.manual_seed(0)
    tower = new_vit_convnet(clip(), WIDTHS, DEPTHS, LAYERS)
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}
    metrics = pretrain_tower(tower, images=8, steps=2, batch=4, feature_layer=-1, report=lambda _: None)
    moved = {name.split(".")[0] for name, p in tower.named_parameters() if not p.equal(before[name])}
    assert moved == {"vit", "convnet"} and 0 <= metrics["kind"] <= 1


@pytest.mark.parametrize("whole", [False, True])
def test_weights_of_clip_and_convnext_folders_become_one_tower(whole, pixels, tmp_path) -> None:
    torch.manual_seed(0)
    vit, convnet = (
        noisy(CLIPVisionModel(clip())),
        noisy(ConvNextModel(ConvNextConfig(num_stages=3, hidden_sizes=WIDTHS, depths=DEPTHS))),
    )
    if whole:  # with CLIP's text tower, and ConvNeXt's classifier
        text = CLIPTextConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        full = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vit.config.to_dict(), projection_dim=16))
        full.vision_model.load_state_dict(vit.state_dict())
        classifier = ConvNextForImageClassification(convnet.config)
        classifier.convnext.load_state_dict(convnet.state_dict())
        full.save_pretrained(tmp_path / "vit"), classifier.save_pretrained(tmp_path / "convnet")
    else:
        vit.save_pretrained(tmp_path / "vit"), convnet.save_pretrained(tmp_path / "convnet")
    tower = VitConvNetModel.from_parts(tmp_path / "vit", tmp_path / "convnet", [-1], [2])
    assert {p.device.type for p in tower.parameters()} == {"cpu"} and not tower.training
    map_8 = convnet(pixels, output_hidden_states=True).hidden_states[2]
    wanted = [vit(pixels).last_hidden_state[:, 1:], map_8.flatten(2).transpose(1, 2)]  # a cell is a patch
    found = tower(pixels).last_hidden_state[:, 1:]
    assert torch.allclose(found.double(), torch.cat([standard(p) for p in wanted], -1), atol=1e-4)
    tower.save_pretrained(tmp_path / "tower")
    again = AutoModel.from_pretrained(tmp_path / "tower", dtype=torch.float32)
    assert again(pixels).last_hidden_state[:, 1:].equal(found)


def test_folders_of_other_kinds_or_without_their_weights_are_refused(tmp_path) -> None:
    CLIPVisionModel(clip()).save_pretrained(tmp_path / "vit")
    ConvNextModel(CONVNEXT).save_pretrained(tmp_path / "convnet")
    with pytest.raises(ValueError, match="convnext cannot be this part of a vit_convnet; use clip_vision_model or dinov2"):
        VitConvNetModel.from_parts(tmp_path / "convnet", tmp_path / "vit", [-1], [1])
    clip(num_hidden_layers=5).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="lacks weights of a clip_vision_model"):
        VitConvNetModel.from_parts(tmp_path / "vit", tmp_path / "convnet", [-1], [1])


def test_dinov2_and_convnextv2_are_parts_too(pixels, tmp_path) -> None:
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**VIT)).save_pretrained(tmp_path / "vit")
    ConvNextV2Model(ConvNextV2Config(num_stages=2, hidden_sizes=[8, 12], depths=[1, 1])).save_pretrained(tmp_path / "convnet")
    tower = VitConvNetModel.from_parts(tmp_path / "vit", tmp_path / "convnet", [4, 2], [1, 2])
    assert tower(pixels).last_hidden_state.shape == (2, 1 + GRID**2, 16 + 16 + 8 + 12)
    logits = llava(tower)(input_ids=IDS, pixel_values=pixels).logits
    assert logits.isfinite().all()


def test_settings_that_do_not_fit_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"vit_layers=\[-6\]: name hidden states of the ViT, -5 to 4"):
        VitConvNetConfig(clip(), vit_layers=[-6])
    with pytest.raises(ValueError, match=r"vit_layers=\[\]"):
        VitConvNetConfig(clip(), vit_layers=[])
    with pytest.raises(ValueError, match=r"conv_stages=\[0\]: name stages of the ConvNet, 1 to 4"):
        VitConvNetConfig(clip(), conv_stages=[0])
    with pytest.raises(ValueError, match="the ViT reads 3 channels, the ConvNet 4: give both as many"):
        VitConvNetConfig(clip(), ConvNextConfig(num_channels=4))
    with pytest.raises(ValueError, match="image_size of a vit_convnet follows from its parts: 64; leave it out"):
        VitConvNetConfig(clip(), image_size=128)
    with pytest.raises(ValueError, match=r"conv_widths=\[8\] and conv_depths=\[1, 1\] must name as many stages"):
        new_vit_convnet(clip(), [8], [1, 1], [-1])


def test_the_full_size_has_the_published_numbers_of_parameters() -> None:
    """CLIP ViT-L/14 and ConvNeXt-L at 448 pixels, four layers and four scales, on the meta device."""
    vit = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=448, patch_size=14
    )
    convnet = ConvNextConfig(hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3])
    with torch.device("meta"):
        tower = AutoModel.from_config(VitConvNetConfig(vit, convnet, vit_layers=[-2, -8, -14, -20]))
        features = tower(torch.empty(1, 3, 448, 448)).last_hidden_state
    assert features.shape == (1, 1 + 32**2, 4 * 1024 + 192 + 384 + 768 + 1536) and features.device.type == "meta"

    # CLIP: the embeddings, two norms, and 24 layers of attention (4 d^2 + 4 d), MLP (8 d^2 + 5 d) and norms (4 d)
    d, positions = 1024, 1 + 32**2
    clip_large = d * (3 * 14**2 + 1 + positions) + 4 * d + 24 * (12 * d * d + 13 * d)
    assert clip_large - (positions - 257) * d == 303_179_776  # ViT-L/14 at 224 pixels without its projection
    # torchvision's convnext_large has 197,767,336 weights, 1000 classes x (1536 + 1) of them in the classifier
    convnext_large = 197_767_336 - 1000 * 1537
    assert tower.num_parameters() == clip_large + convnext_large == 500_196_544
