"""A tiny teacher and student over one vocabulary and one CLIP tower, with synthetic images and questions."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist
from sharp import sharpen

from geodistill.config import ModelConfig, VisionConfig
from geodistill.data import synthetic
from geodistill.data.record import open_image
from geodistill.data.rows import Packer
from geodistill.language import BOS, EOS, IMAGE, PAD, SYSTEM
from geodistill.models import assemble

torch.set_num_threads(1)
VISION = VisionConfig(hidden=32, layers=3, heads=2, patch=8, image_size=32)
IMAGE_TOKENS = 16


@pytest.fixture(scope="session")
def records():
    return list(synthetic.records(0, "train", 20))


@pytest.fixture(scope="session")
def tokenizer(records):
    texts = [text for r in records for c in r.conversations for turn in c.turns for text in turn]
    return assemble.new_tokenizer(texts, 600, SYSTEM)


@pytest.fixture(scope="session")
def processor(tokenizer):
    return assemble.new_processor(tokenizer, VISION.image_size, VISION.patch)


@pytest.fixture(scope="session")
def end(tokenizer) -> int:
    return tokenizer.convert_tokens_to_ids(EOS)


@pytest.fixture(scope="session")
def forbidden(tokenizer):
    mask = torch.zeros(len(tokenizer), dtype=torch.bool)
    mask[tokenizer.convert_tokens_to_ids([PAD, BOS, IMAGE])] = True
    return mask


@pytest.fixture(scope="session")
def make_packer(tokenizer):
    """questions_per_row -> Packer; one piece a row, so that all is in the order of the questions, unless share_rows=True."""

    def make(n: int, max_response: int = 160, share_rows: bool = False, tokens_per_row: int = 0) -> Packer:
        sizes = {"tokens_per_row": tokens_per_row, "share_rows": share_rows}
        return Packer(tokenizer, IMAGE, IMAGE_TOKENS, max_response, n, **sizes)

    return make


@pytest.fixture(scope="session")
def questions(make_packer, records):
    """The questions of each record."""
    return [make_packer(8).questions(r.id, r.conversations) for r in records]


@pytest.fixture(scope="session")
def pictures(records):
    return [open_image(r.image, r.id) for r in records]


@pytest.fixture(scope="session")
def pixels(processor, pictures):
    """[B, 3, 32, 32] as the processor makes them."""
    return processor.image_processor(pictures, return_tensors="pt").pixel_values


@pytest.fixture(scope="session")
def messages():
    """Turns of a conversation -> the processor's messages, up to the cue for the last answer."""

    def build(turns):
        found = []
        for i, (question, answer) in enumerate(turns):
            text = [{"type": "text", "text": question}]
            found.append({"role": "user", "content": text if i else [{"type": "image"}, *text]})
            found.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return found[:-1]

    return build


@pytest.fixture(scope="session")
def process_group(tmp_path_factory):
    """A process group of this process. One for the session: DeepSpeed keeps to the first that it meets."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def alone(process_group, monkeypatch):
    """Inside the test: what DeepSpeed reads of a worker that is alone."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


def _model(tokenizer, hidden: int, heads: int, seed: int, tower=None):
    torch.manual_seed(seed)
    sizes = ModelConfig(vision=VISION, hidden=hidden, layers=2, heads=heads, intermediate=2 * hidden)
    model = assemble.new_model(sizes, tokenizer).eval()
    sharpen(model, seed)
    if tower is not None:
        model.model.vision_tower.load_state_dict(tower.state_dict())
    return model


@pytest.fixture(scope="session")
def teacher(tokenizer):
    return _model(tokenizer, hidden=48, heads=4, seed=1)


@pytest.fixture(scope="session")
def student(tokenizer, teacher):
    return _model(tokenizer, hidden=32, heads=2, seed=2, tower=teacher.model.vision_tower)
