"""Reader: a saved model with all that is needed to ask it: tokenizer, packer of image rows, size of images, forbidden tokens."""

from pathlib import Path

import torch

from geodistill.data.rows import Packer
from geodistill.models import assemble
from geodistill.models.row_model import row_model

ANY_LENGTH = 10**6


class Reader:
    """folder: what `assemble.load` reads; questions_per_row: of an image, one where the model takes no row mask; share_rows: may
    a row hold several images? image_size: pixels of a side that images are brought to, 0: what the tower sees.

    Raises ValueError for a folder that cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        questions_per_row: int = 8,
        share_rows: bool = True,
        image_size: int = 0,
    ):
        model, processor = assemble.load(folder, dtype)
        self.device = torch.device(device)
        self.tokenizer = processor.tokenizer
        self.model = row_model(model, processor.image_processor, vocabulary=len(self.tokenizer)).to(self.device).eval()
        self.size = assemble.image_side(model.config, image_size)
        image_token = self.tokenizer.convert_ids_to_tokens(self.model.image_token)
        with torch.no_grad():
            tokens = self.model.image_tokens(self.size)
        around = self.model.around()
        self.packer = Packer(self.tokenizer, image_token, tokens, ANY_LENGTH, questions_per_row, around, share_rows=share_rows)
        self.model.begin(self.packer.prefix, self.packer.prompt, self.size)
        if not self.model.takes_rows:
            self.packer.questions_per_row, self.packer.share_rows = 1, False
        self.forbidden = assemble.forbidden_tokens(self.tokenizer, len(self.tokenizer)).to(self.device)
        self.end: int = self.tokenizer.eos_token_id
        self.special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def prompt(self, turns: list[tuple[str, str | None]]) -> list[int]:
        """Token ids behind the image of a conversation whose last turn waits for its answer. Raises ValueError where a text holds
        one of the model's special tokens."""
        for token in self.special:
            if any(token in (text or "") for turn in turns for text in turn):
                raise ValueError(f"the text holds the special token {token}")
        return self.packer.ask(turns)

    def text(self, tokens: list[int]) -> str:
        """What an answer says."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
