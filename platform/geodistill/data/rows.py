"""Image rows: an image and up to n of its questions are a piece, and a row holds one piece or more. Pure torch, no ray.

    [image][prompt 1]...[prompt n][image][prompt 1]... | [response tokens of all branches]
    piece 0                       piece 1              |
                 prompt region P                       |        response region C

Every token has a branch: piece k of a row has the code k * STRIDE for its image prefix and k * STRIDE + 1, + 2, ... for its
questions; -1 is padding. And it has a position in its own branch, which goes on from the prefix of its piece. It attends to that
prefix and to its own branch, up to its own position: that rule alone makes the mask, whatever the order of the columns. The last
token of each prompt opens the response region, because its output predicts the first response token.

Shapes: R rows, I pieces, n branches a row, P prompt columns, C response columns, T longest response, M response tokens in all.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geodistill.data import packing
from geodistill.data.record import BadRecord, Conversation
from geodistill.language import TOKEN_CATEGORIES, token_task

PADDING = -1
STRIDE = 1024  # codes of a piece, which has fewer questions than that


@dataclass
class Question:
    """One branch before packing. `prompt`, `response`: token ids after the image; response None: to be written."""

    prompt: list[int]
    response: list[int] | None
    task: str
    category: str = ""
    text: str = ""
    references: list[str] = field(default_factory=list)


@dataclass
class Rows:
    """A batch of image rows up to the responses. `questions[r][b]` is branch b of row r, over all its pieces."""

    image_I: Tensor  # which image of the batch each piece shows: row by row, in the order of the image tokens of ids_RP
    ids_RP: Tensor  # prefixes and prompts without their last token
    branch_RP: Tensor
    position_RP: Tensor
    last_Rn: Tensor  # last token of each prompt
    start_Rn: Tensor  # its position
    alive_Rn: Tensor  # False: this row has fewer questions
    branch_Rn: Tensor  # the code of each branch; PADDING where it is not alive
    question_Rn: Tensor  # its number among all questions of the batch, image by image; PADDING where it is not alive
    questions: list[list[Question]]

    def to(self, device: torch.device | str) -> "Rows":
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass
class Responses:
    """The response region of a batch of rows: token ids to feed, what each must predict, and where it belongs."""

    ids_RC: Tensor
    branch_RC: Tensor
    position_RC: Tensor
    target_RC: Tensor
    valid_RC: Tensor
    step_RC: Tensor  # t of each response token in its branch

    @property
    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """(target, sequence, step), each [M], of the valid tokens, row by row and branch by branch.

        A sequence number is made of row and branch: unique over the batch, but not dense.
        """
        width = int(self.branch_RC.max()) + 1 if self.branch_RC.numel() else 1
        rows = torch.arange(len(self.ids_RC), device=self.ids_RC.device)[:, None]
        sequence_RC = rows * width + self.branch_RC
        return self.target_RC[self.valid_RC], sequence_RC[self.valid_RC], self.step_RC[self.valid_RC]


def attends(branch_q: Tensor, position_q: Tensor, branch_k: Tensor, position_k: Tensor) -> Tensor:
    """The row mask, bool [R, 1, Q, K]: may query token i see key token j? Padding sees the first prefix, nothing sees padding."""
    own = branch_q.clamp(min=0)[:, :, None]
    same = (branch_k[:, None, :] == own // STRIDE * STRIDE) | (branch_k[:, None, :] == own)
    return (same & (position_k[:, None, :] <= position_q[:, :, None]))[:, None]


class Piece(NamedTuple):
    """Some questions of one image. first: the number of the first among all questions of the batch."""

    image: int
    first: int
    questions: list[Question]


class Packer:
    """Turns conversations into questions, and questions into rows, with one tokenizer and prompt template.

    tokenizer: a transformers fast tokenizer with a chat template; image_tokens: how many tokens an image takes; around: special
    tokens before and behind them, beside the template's. prompt: the tokens behind the image of a question, as an example.
    questions_per_row: of an image, in one piece at most. tokens_per_row: at most in a row, answers included (those that are not
    known count as max_response); 0: any number; a question that alone passes it has a row of its own. share_rows: may pieces
    share a row? To be forbidden where a model does not read the mask.
    """

    def __init__(
        self,
        tokenizer,
        image_token: str,
        image_tokens: int,
        max_response: int,
        questions_per_row: int,
        around: tuple[str, str] = ("", ""),
        tokens_per_row: int = 0,
        share_rows: bool = True,
    ):
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.image_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_tokens = image_tokens
        self.max_response = max_response
        self.questions_per_row = questions_per_row
        self.tokens_per_row = tokens_per_row
        self.share_rows = share_rows
        ((before, self.prompt),) = self._split([self._prompt([], "?")])
        if before[:2] == [tokenizer.bos_token_id] * 2:  # the template writes it, and the tokenizer another
            before = before[1:]
        left, right = (tokenizer(text, add_special_tokens=False).input_ids if text else [] for text in around)
        self.prefix = before[:-1] + left + [self.image_id] * image_tokens + right

    def _prompt(self, history: list[tuple[str, str]], question: str) -> str:
        messages: list[dict] = []
        for i, (q, a) in enumerate([*history, (question, None)]):
            parts: list[dict] = [{"type": "text", "text": q}]
            messages.append({"role": "user", "content": [{"type": "image"}, *parts] if i == 0 else parts})
            if a is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": a}]})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _split(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Token ids of each text up to and after its image token (a special token, so neither side touches the other)."""
        found = []
        for ids in self.tokenizer(texts).input_ids if texts else []:
            if self.image_id not in ids:
                raise ValueError(f"the chat template does not write {self.image_token}: this family cannot be read")
            at = ids.index(self.image_id)
            found.append((ids[: at + 1], ids[at + 1 :]))
        return found

    def ask(self, turns: list[tuple[str, str | None]]) -> list[int]:
        """Token ids behind the image of a conversation whose last turn waits for its answer."""
        text = self._prompt([(question, answer or "") for question, answer in turns[:-1]], turns[-1][0])
        ((_, ids),) = self._split([text[text.index(self.image_token) :]])
        return ids

    def questions(
        self,
        record: str,
        conversations: list[Conversation],
        with_answers: bool = True,
        rejected: list[BadRecord] | None = None,
    ) -> list[Question]:
        """Every turn whose earlier turns have answers, as a question.

        A response over the limit goes to `rejected`, with its reason, or raises BadRecord where there is no such list.
        """
        asked = []  # (where, conversation, turn number, prompt text, text with answer)
        for i, conversation in enumerate(conversations):
            for j, (question, answer) in enumerate(conversation.turns):
                history = [(q, a) for q, a in conversation.turns[:j] if a is not None]
                if len(history) < j:
                    break
                text = self._prompt(history, question)
                text = text[text.index(self.image_token) :]  # what stands before a special token does not change what follows
                gap = "" if text[-1:].isspace() else " "  # templates that end in a new line leave none
                full = text if answer is None else f"{text}{gap}{answer}{self.tokenizer.eos_token}"
                asked.append((f"conversations[{i}].turns[{j}].answer", conversation, j, text, full))
        ids = self._split([text for *_, prompt, full in asked for text in (prompt, full)])
        found = []
        for (where, conversation, j, _, _), (_, prompt), (_, whole) in zip(asked, ids[::2], ids[1::2], strict=True):
            question, answer = conversation.turns[j]
            response = whole[len(prompt) :] if answer is not None else None
            if response is not None and len(response) > self.max_response:
                reason = f"{len(response)} tokens are over the limit max_response={self.max_response}"
                if rejected is None:
                    raise BadRecord(record, where, reason)
                rejected.append(BadRecord(record, where, reason))
                response = None  # the prompt can still be answered
            last = j == len(conversation.turns) - 1
            references = conversation.references if last and conversation.references else [answer] if answer else []
            response = response if with_answers else None
            task, category = conversation.task, conversation.category
            if j:  # a later turn may ask for something else
                task, category = token_task(question) or (
                    ("conversation", "") if category in TOKEN_CATEGORIES else (task, category)
                )
            found.append(Question(prompt, response, task, category, question, references))
        return found

    def _pieces(self, images: list[list[Question]], evenly: bool) -> tuple[list[Piece], list[packing.Size]]:
        """The pieces of every image, and their sizes."""
        pieces, sizes = [], []
        prefix, first = len(self.prefix), 0
        for image, asked in enumerate(images):
            most = [len(q.prompt) - 1 + (self.max_response if q.response is None else len(q.response)) for q in asked]
            at = 0
            for count in packing.cut(prefix, most, min(self.questions_per_row, STRIDE - 1), self.tokens_per_row, evenly):
                part = asked[at : at + count]
                prompts, answers = sum(len(q.prompt) - 1 for q in part), sum(len(q.response or []) for q in part)
                pieces.append(Piece(image, first + at, part))
                sizes.append(packing.Size(prefix + prompts, answers, prefix + sum(most[at : at + count])))
                at += count
            first += len(asked)
        return pieces, sizes

    def _rows(self, images: list[list[Question]]) -> list[list[Piece]]:
        """The pieces of every row: of even length if that leaves little padding, else as full as can be if that leaves less."""
        found = []
        for evenly in (True, False) if self.share_rows else (True,):
            pieces, sizes = self._pieces(images, evenly)
            share, rows = packing.group(sizes, self.tokens_per_row, self.share_rows)
            found.append((share, [[pieces[i] for i in row] for row in rows]))
            if share <= packing.PADDING_SHARE:
                break
        return min(found, key=lambda one: one[0])[1]

    def pack(self, images: list[list[Question]]) -> Rows:
        """Questions of each image -> rows.

        An image's questions are cut, in order, into as few pieces as `questions_per_row` and `tokens_per_row` allow; pieces share
        rows where that brings padding down to packing.PADDING_SHARE. The same questions always make the same rows.
        """
        packed = self._rows(images)
        questions = [[q for piece in row for q in piece.questions] for row in packed]
        prefix, width = len(self.prefix), max(len(asked) for asked in questions)
        columns = max(prefix * len(row) + sum(len(q.prompt) - 1 for piece in row for q in piece.questions) for row in packed)
        shape = (len(packed), columns)
        ids = torch.full(shape, self.tokenizer.pad_token_id)
        branch, position = torch.full(shape, PADDING), torch.zeros(shape, dtype=torch.long)
        last = torch.full((len(packed), width), self.tokenizer.pad_token_id)
        start, code, number = torch.zeros_like(last), torch.full_like(last, PADDING), torch.full_like(last, PADDING)
        for r, row in enumerate(packed):
            flat: list[int] = []
            branches: list[int] = []
            positions: list[int] = []
            ends = []
            for k, piece in enumerate(row):
                flat += self.prefix
                branches += [k * STRIDE] * prefix
                positions += range(prefix)
                for i, question in enumerate(piece.questions):
                    length = len(question.prompt) - 1
                    flat += question.prompt[:-1]
                    branches += [k * STRIDE + 1 + i] * length
                    positions += range(prefix, prefix + length)
                    ends.append((question.prompt[-1], prefix + length, k * STRIDE + 1 + i, piece.first + i))
            for part, values in zip((last, start, code, number), torch.tensor(ends).T, strict=True):
                part[r, : len(ends)] = values
            ids[r, : len(flat)] = torch.tensor(flat)
            branch[r, : len(flat)] = torch.tensor(branches)
            position[r, : len(flat)] = torch.tensor(positions)
        image = torch.tensor([piece.image for row in packed for piece in row])
        return Rows(image, ids, branch, position, last, start, code != PADDING, code, number, questions)

    def answers(self, rows: Rows) -> Responses:
        """The response region of the answers in the data (questions without one take no part)."""
        answers = [[q.response or [] for q in row] for row in rows.questions]
        longest = max((len(a) for row in answers for a in row), default=0)
        tokens = torch.full((*rows.last_Rn.shape, max(longest, 1)), self.tokenizer.pad_token_id)
        lengths = torch.zeros_like(rows.last_Rn)
        for r, row in enumerate(answers):
            for b, answer in enumerate(row):
                tokens[r, b, : len(answer)] = torch.tensor(answer, dtype=torch.long)
                lengths[r, b] = len(answer)
        return respond(rows, tokens.to(rows.last_Rn.device), lengths)


def padding(rows: Rows, responses: Responses | None = None) -> float:
    """Share of the columns that hold padding, in the prompts or in prompts and responses."""
    parts = [rows.branch_RP] if responses is None else [rows.branch_RP, responses.branch_RC]
    return float(torch.cat([(part == PADDING).float() for part in parts], 1).mean())


def respond(rows: Rows, tokens_RnT: Tensor, length_Rn: Tensor) -> Responses:
    """Place responses behind their rows, without gaps: [R, n, T] padded tokens -> a response region [R, C]."""
    R, n, T = tokens_RnT.shape
    valid = (torch.arange(T, device=tokens_RnT.device) < length_Rn[..., None]).reshape(R, n * T)
    columns = max(int(valid.sum(1).max()), 1)
    order = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)[:, :columns]
    valid_RC = valid.gather(1, order)
    b, t = order // T, order % T
    fed = torch.cat([rows.last_Rn[..., None], tokens_RnT[..., :-1]], dim=2).reshape(R, n * T)
    return Responses(
        ids_RC=fed.gather(1, order),
        branch_RC=torch.where(valid_RC, rows.branch_Rn.gather(1, b), PADDING),
        position_RC=torch.where(valid_RC, rows.start_Rn.gather(1, b) + t, 0),
        target_RC=tokens_RnT.reshape(R, n * T).gather(1, order),
        valid_RC=valid_RC,
        step_RC=t,
    )
