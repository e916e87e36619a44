"""How the row mask is read: FlexAttention sees what SDPA sees, and is taken only where it can be trained."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from geodistill.config import ConfigError, load
from geodistill.data.rows import attends
from geodistill.distill.cache import new_cache
from geodistill.models import attention
from geodistill.models.attention import block_mask, faster
from geodistill.models.row_model import RowModel


def row_mask(make_packer, questions):
    rows = make_packer(8).pack(questions[:3])
    return rows, attends(rows.branch_RP, rows.position_RP, rows.branch_RP, rows.position_RP)


@pytest.mark.filterwarnings("ignore")
def test_a_block_mask_hides_what_the_row_mask_hides(make_packer, questions):
    _, mask = row_mask(make_packer, questions)
    query, key, value = torch.randn(3, len(mask), 2, mask.shape[2], 16)
    with torch.no_grad():
        found = flex_attention(query, key, value, block_mask=block_mask(mask))
    torch.testing.assert_close(found, scaled_dot_product_attention(query, key, value, mask), rtol=1e-4, atol=1e-5)


def test_sdpa_in_blocks_is_sdpa(monkeypatch, teacher, make_packer, questions, pixels):
    """Values and gradients, with a cache in which columns stand already and without."""
    rows, mask = row_mask(make_packer, questions)
    model, found = RowModel(teacher), []
    z = model.project(model.see(pixels[:3])).detach()[rows.image_I]
    cut = int((rows.ids_RP == model.image_token).nonzero()[:, 1].max()) + 5
    for block in (7, 10**6):
        monkeypatch.setattr(attention, "BLOCK", block)
        cache = new_cache(model.model)
        whole = model.hidden(rows.ids_RP, rows.position_RP, mask, z)
        with torch.no_grad():
            model.hidden(rows.ids_RP[:, :cut], rows.position_RP[:, :cut], mask[:, :, :cut, :cut], z, cache)
            behind = model.hidden(rows.ids_RP[:, cut:], rows.position_RP[:, cut:], mask[:, :, cut:], None, cache)
        used = rows.branch_RP >= 0
        (grad,) = torch.autograd.grad(whole[used].square().sum(), model.model.get_input_embeddings().weight)
        torch.testing.assert_close(behind[used[:, cut:]], whole[:, cut:][used[:, cut:]], rtol=1e-4, atol=1e-4)
        found.append((whole[used], grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.timeout(400)  # it is compiled
def test_a_model_reads_rows_by_flex_as_by_sdpa(teacher, make_packer, questions, pixels):
    rows, mask = row_mask(make_packer, questions)
    model = RowModel(teacher)
    with torch.no_grad():
        z = model.project(model.see(pixels[:3]))[rows.image_I]
        expected = model.hidden(rows.ids_RP, rows.position_RP, mask, z)
        model.attend_by("flex")
        try:
            found = model.hidden(rows.ids_RP, rows.position_RP, mask, z)
        finally:
            model.attend_by("sdpa")
    used = rows.branch_RP >= 0
    torch.testing.assert_close(found[used], expected[used], rtol=1e-4, atol=1e-4)


def test_on_a_cpu_it_is_sdpa(teacher):
    model = RowModel(teacher)
    name, told = faster(model, 2, 40)
    assert name == model.attention == "sdpa" and "no backward pass" in told
    with pytest.raises(ConfigError, match="attention=flex needs GPUs"):
        load(None, ["cluster.attention=flex"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention is trained on GPUs alone, and there is none")
def test_on_a_gpu_the_faster_is_taken(teacher):
    model = RowModel(teacher).cuda()
    name, told = faster(model, 2, 256)
    assert name == model.attention and ("ms" in told or "cannot be used" in told)
    model.attend_by("sdpa")
    model.cpu()
