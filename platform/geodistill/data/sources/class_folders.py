"""Scene data sets stored as root/<Class>/<image>: AID, UCMerced, NWPU-RESISC45, EuroSAT.

Folders that an archive puts above the classes are passed over (UCMerced_LandUse/Images/<class>/<image>).

data.annotations may add human captions and questions: a JSON list of
{"image": "Class/file.jpg", "captions": [text], "questions": [{"question", "answer", "type"}]}.
"""

import re
from collections import Counter
from collections.abc import Iterator

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord, Conversation, ImageRecord
from geodistill.data.sources.base import (
    IMAGE_SUFFIXES,
    Item,
    Root,
    bad_item,
    clean,
    new_record,
    read_annotations,
    read_image,
    split_of,
)
from geodistill.language import SHORT_ANSWER

ASK_CLASS = f"What is the class of this scene? {SHORT_ANSWER}"
ASK_CAPTION = "Describe the image in one sentence."


def class_name(folder: str) -> str:
    """A folder's name as an answer: "SparseResidential" -> "sparse residential", "baseball_diamond" -> "baseball diamond"."""
    return clean(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", folder)).lower()


def caption_conversations(captions: list[str], split: str) -> list[Conversation]:
    """The conversations of an image with several captions: one each in training, one with all as references in a test."""
    if not captions:
        return []
    if split in ("train", "val"):
        return [Conversation("captioning", [(ASK_CAPTION, caption)]) for caption in captions]
    return [Conversation("captioning", [(ASK_CAPTION, captions[0])], references=captions)]


class ClassFolders:
    def __init__(self, data: DataConfig):
        self.data, self.root = data, Root(data)

    def items(self) -> list[Item]:
        """One item an image, in order of path, then one for each unusable annotation. ValueError: no image, no annotations."""
        files = self.root.list()
        tops = [top for top, _ in Counter("/".join(file.split("/")[:-2]) for file in files if "/" in file).most_common()]
        if not tops:
            raise ValueError(
                f"no image found as data.root={self.data.root}/<Class>/<image> ({', '.join(IMAGE_SUFFIXES)}); "
                "set data.root to the folder that holds one folder a class"
            )
        top = tops[0]
        if top and len(tops) > 1:
            raise ValueError(
                f"data.root={self.data.root} holds more than one folder of classes ({tops[0]}/<Class>, {tops[1]}/<Class>); "
                "set data.root to one of them"
            )
        above = f"{top}/" if top else ""
        refs, rejected = {}, []
        for file in files:
            image = file.removeprefix(above)
            if image.count("/") == 1:
                refs[image] = {"file": file, "class": class_name(image.split("/")[0])}
            else:
                reason = f"does not lie as {above}<Class>/<image>, so its class is not known"
                rejected.append(bad_item(self.data, file, BadRecord(image, "image", reason)))
        rejected += self._annotate(refs) if self.data.annotations else []
        return [Item(split_of(self.data, image), image, ref) for image, ref in refs.items()] + rejected

    def _annotate(self, refs: dict[str, dict]) -> list[Item]:
        """Add "captions" and "questions" to the refs that data.annotations names; return what cannot be used."""
        entries = read_annotations(self.data, self.root)
        rejected = []

        def reject(record: str, field: str, reason: str) -> None:
            rejected.append(bad_item(self.data, self.data.annotations, BadRecord(record, field, reason)))

        for i, entry in enumerate(entries):
            entry = entry if isinstance(entry, dict) else {}
            image = clean(entry.get("image"))
            if image not in refs:
                reject(image or f"[{i}]", "image", "does not exist below data.root" if image else "is missing")
                continue
            for key in ("captions", "questions"):
                if not isinstance(entry.get(key, []), list):
                    reject(image, key, "is not a list")
                    entry[key] = []
            for j, caption in enumerate(entry.get("captions", [])):
                if clean(caption):
                    refs[image].setdefault("captions", []).append(clean(caption))
                else:
                    reject(image, f"captions[{j}]", "is empty")
            for j, asked in enumerate(entry.get("questions", [])):
                asked = asked if isinstance(asked, dict) else {}
                texts = {key: clean(asked.get(key)) for key in ("question", "answer", "type")}
                empty = [key for key in ("question", "answer") if not texts[key]]
                if empty:
                    reject(image, f"questions[{j}].{empty[0]}", "is empty")
                else:
                    refs[image].setdefault("questions", []).append(texts)
        return rejected

    def make(self, item: Item) -> Iterator[ImageRecord]:
        """The class question, the captions and the questions of one image. Raises BadRecord."""
        image, width, height = read_image(self.root, item, self.data.bands)
        captions = item.ref.get("captions", [])
        found = [Conversation("scene_classification", [(ASK_CLASS, item.ref["class"])])]
        found += caption_conversations(captions, item.split)
        for asked in item.ref.get("questions", []):
            found.append(Conversation("vqa", [(f"{asked['question']} {SHORT_ANSWER}", asked["answer"])], asked["type"]))
        yield new_record(self.data, item, image, width, height, found)
