"""The smallest sound data set of every format, written where a test wants it.

A new format gets a function here; tests/datasets/test_fuzz.py then throws bytes at its reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_coco
import test_conversations
import test_kvasir_vqa_x1
import test_pitvqa
import test_psi_ava_vqa
import test_real_colon_vqa
import test_ssg_vqa
import test_surgvu25
from sources import PIXEL, write


def rows() -> list[dict[str, Any]]:
    """Twelve questions on three images, with every column of a table."""
    return [
        {
            "id": f"q{number}",
            "image": f"{number % 3}.png",
            "question": f"Is there a polyp, {number}?",
            "answer": ["yes", "no", "2"][number % 3],
            "question_type": "yes_no",
            "group": f"video {number % 3}",
            "split": ["train", "val", "test"][number % 3],
            "stage": number % 3 + 1,
        }
        for number in range(12)
    ]


def _images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PIXEL)


def jsonl(folder: Path) -> dict[str, Any]:
    _images(folder, "0.png", "1.png", "2.png")
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return {"path": str(folder / "q.jsonl")}


def csv(folder: Path) -> dict[str, Any]:
    _images(folder, "0.png", "1.png", "2.png")
    lines = [",".join(rows()[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows())]
    (folder / "q.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"path": str(folder / "q.csv")}


def parquet(folder: Path) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet

    _images(folder, "0.png", "1.png", "2.png")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), folder / "q.parquet")
    return {"path": str(folder / "q.parquet")}


def demo(folder: Path) -> dict[str, Any]:
    jsonl(folder)
    (folder / "q.jsonl").rename(folder / "questions.jsonl")
    return {"path": str(folder)}


def kvasir_vqa(folder: Path) -> dict[str, Any]:
    _images(folder, *(f"images/{number}.jpg" for number in range(3)))
    lines = [
        f"polyps,How many polyps are in the image?,{number % 4},{number % 3}"  # as the corpus's own columns
        for number in range(12)
    ]
    (folder / "metadata.csv").write_text("\n".join(["source,question,answer,img_id", *lines]) + "\n")
    return {"path": str(folder), "split": {"by": "image"}}


def json_list(folder: Path) -> dict[str, Any]:
    _images(folder, "0.png", "1.png", "2.png")
    (folder / "q.json").write_text(json.dumps(rows(), indent=1), encoding="utf-8")
    return {"path": str(folder / "q.json")}


def hub(folder: Path) -> dict[str, Any]:
    """A clone of a repository of the hub, with images as files."""
    jsonl(folder)
    (folder / "q.jsonl").unlink()
    for part in ("train", "validation", "test"):
        own = [{**row, "split": part} for row in rows() if part.startswith(row["split"])]
        text = "".join(json.dumps(row) + "\n" for row in own)
        write(folder, {f"data/{part}.jsonl": text})
    return {"path": str(folder)}


def llava(folder: Path) -> dict[str, Any]:
    def values(row: dict[str, Any]) -> dict[str, Any]:
        turns = test_conversations.said(f"<image>\n{row['question']}", row["answer"], "Where?", "left")
        return {"id": row["id"], "image": row["image"], "split": row["split"], "conversations": turns}

    _images(folder, "0.png", "1.png", "2.png")
    (folder / "q.json").write_text(json.dumps([values(row) for row in rows()], indent=1), encoding="utf-8")
    return {"path": str(folder / "q.json")}


def messages(folder: Path) -> dict[str, Any]:
    def values(row: dict[str, Any]) -> dict[str, Any]:
        parts = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["question"]}]
        held = {"messages": test_conversations.messages(parts, row["answer"])}
        named = {
            "messages": test_conversations.messages(f"<image>{row['question']}", row["answer"]),
            "images": [row["image"]],
        }
        return {"id": row["id"], "split": row["split"], **(held if row["stage"] == 1 else named)}

    _images(folder, "0.png", "1.png", "2.png")
    lines = "".join(json.dumps(values(row)) + "\n" for row in rows())
    (folder / "q.jsonl").write_text(lines, encoding="utf-8")
    return {"path": str(folder / "q.jsonl")}


def kvasir_vqa_x1(folder: Path) -> dict[str, Any]:
    test_kvasir_vqa_x1.pictures(folder / "images")
    for part, start in (("train", 0), ("test", 6)):
        lines = "".join(json.dumps(row) + "\n" for row in test_kvasir_vqa_x1.rows(start, 6))
        write(folder, {f"{part}.jsonl": lines})
    return {"path": str(folder)}


def endovis18_vqa(folder: Path) -> dict[str, Any]:
    lines = [_ORGAN, "Where is bipolar_forceps located?|left-top", _STATE]
    for name in ("seq_1", "seq_2"):
        for frame in ("frame000", "frame001"):
            questions = {f"{name}/vqa/Classification/{frame}_QA.txt": "\n".join(lines) + "\n"}
            write(folder, {f"{name}/left_frames/{frame}.png": PIXEL, **questions})
    return {"path": str(folder)}


def endovis18_vqla(folder: Path) -> dict[str, Any]:
    for name in ("seq_1", "seq_2"):
        for frame in ("frame000", "frame001"):
            questions = {f"{name}/vqla/label/{frame}_QAL.txt": _WITH_BOXES}
            write(folder, {f"{name}/left_frames/{frame}.png": PIXEL, **questions})
    return {"path": str(folder)}


def endovis17_vqla(folder: Path) -> dict[str, Any]:
    for frame in ("seq1_frame001", "seq1_frame002", "seq2_frame001"):
        write(folder, {f"left_frames/{frame}.jpg": PIXEL, f"vqla/label/{frame}.txt": _WITH_BOXES})
    return {"path": str(folder)}


def cholec80_vqa(folder: Path) -> dict[str, Any]:
    lines = f"{_TOOLS}\nis grasper used in calot triangle dissection?|yes\n{_PHASE}\n"
    for video in (4, 5):
        for frame in (0, 100):
            questions = {f"Classification/{video}/{frame}_QA.txt": lines}
            write(folder, {f"cropped_image/{video}/{frame}.png": PIXEL, **questions})
    return {"path": str(folder)}


def surgicalgpt(folder: Path) -> dict[str, Any]:
    files = {
        "Train/endovis_C1.txt": f"seq_2/frame110|{_STATE}\nseq_2/frame110|{_ORGAN}\n" * 3,
        "Val/endovis_C1.txt": f"seq_1/frame110|{_STATE}\nseq_1/frame110|{_ORGAN}\n" * 3,
        "Val/C1_Phase.txt": f"5/14400|{_PHASE}\n5/14400.png|{_TOOLS}\n" * 3,
    }
    frames = ("seq_1/left_fr/frame110", "seq_2/left_fr/frame110", "cropped_image/5/14400")
    write(folder, {**files, **{f"{frame}.png": PIXEL for frame in frames}})
    return {"path": str(folder)}


def psi_ava_vqa(folder: Path) -> dict[str, Any]:
    return {"path": str(test_psi_ava_vqa.corpus(folder)), "variant": "with_actions"}


def ssg_vqa(folder: Path) -> dict[str, Any]:
    for name in ("VID01", "VID02", "VID04"):
        write(folder, {f"qa_txt/{name}/1.txt": test_ssg_vqa.LINES, f"{name}/000001.png": PIXEL})
    return {"path": str(folder)}


def pitvqa(folder: Path) -> dict[str, Any]:
    for name in ("video_01", "video_02"):
        write(folder, {f"QA/{name}/00001.txt": test_pitvqa.LINES, f"images/{name}/00001.png": PIXEL})
    return {"path": str(folder)}


def real_colon_vqa(folder: Path) -> dict[str, Any]:
    clips = test_real_colon_vqa.CLIPS[:3]
    test_real_colon_vqa.write(folder / "annotations/in_template.jsonl", *clips)
    test_real_colon_vqa.frames(folder, *clips)
    return {"path": str(folder)}


def surgvu25(folder: Path) -> dict[str, Any]:
    for name in ("case122", "case123"):
        test_surgvu25.case(folder, name, frames=2)
    return {"path": str(folder)}


def coco(folder: Path) -> dict[str, Any]:
    for part in ("train", "val"):
        found, nothing = (f"{part}/found.png", test_coco.FOUND[1]), (f"{part}/nothing.png", [])
        test_coco.write(folder / f"annotations/{part}.json", found, nothing)
    return {"path": str(folder)}


_ORGAN = "What organ is being operated?|kidney"
_STATE = "What is the state of clip applier?|Idle"
_PHASE = "what is the phase of image?|calot triangle dissection"
_TOOLS = "how many tools are operating?|1"
_WITH_BOXES = f"{_ORGAN}|1,1,1280,1024\n{_STATE}|641, 513, 960, 1000\n"

LAYOUTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "demo": demo,
    "jsonl": jsonl,
    "csv": csv,
    "parquet": parquet,
    "kvasir_vqa": kvasir_vqa,
    "endovis18_vqa": endovis18_vqa,
    "json": json_list,
    "hub": hub,
    "llava": llava,
    "messages": messages,
    "kvasir_vqa_x1": kvasir_vqa_x1,
    "endovis18_vqla": endovis18_vqla,
    "endovis17_vqla": endovis17_vqla,
    "cholec80_vqa": cholec80_vqa,
    "surgicalgpt": surgicalgpt,
    "psi_ava_vqa": psi_ava_vqa,
    "ssg_vqa": ssg_vqa,
    "pitvqa": pitvqa,
    "real_colon_vqa": real_colon_vqa,
    "surgvu25": surgvu25,
    "coco": coco,
}
"""Format → what writes it into an empty folder and returns the further keys of a recipe's `data`."""
