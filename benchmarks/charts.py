"""Results as charts and tables: `python -m benchmarks.charts` reads the files in benchmarks/results, draws
docs/images and writes the tables between the markers of docs/benchmarks.md and docs/metrics.md.

Needs matplotlib: `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.record import RESULTS

DOCS = RESULTS.parents[1] / "docs"
PAGES = ("benchmarks.md", "metrics.md")
FAMILIES = {"qwen2_vl": "Qwen2-VL", "qwen3_vl": "Qwen3-VL"}
LOOKS = {
    "trees": ("trees", "#0072b2", "o"),
    "rows": ("trees: false", "#d55e00", "s"),
    "plain": ("transformers' loop", "#555555", "^"),
    "trl": ("TRL", "#cc79a7", "v"),
}
"""Label, colour (Okabe and Ito's, told apart without red and green) and marker of each way to train."""
DECODE_LOOKS = {
    "trees": LOOKS["trees"],
    "rows": ("generate, row by row", "#d55e00", "s"),
    "batches": ("generate, padded batches", "#555555", "^"),
}


_HEAD = (
    "| Model | Questions per image | Way | Questions/s | Tokens/s | Real tokens | Peak memory | Trees are |"
)
_ALIGNED = "|---|--:|---|--:|--:|--:|--:|--:|--:|"


def tables(results: Path) -> dict[str, str]:
    """Markdown tables of the results that there are, by the name of their marker."""
    makers = {
        "train": _train_table,
        "decode": _decode_table,
        "labels": _labels_table,
        "options": _options_table,
        "data": _data_table,
        "where": _where_table,
        "checkpoint": _checkpoint_table,
        "plan": _plan_table,
        "grouping": _grouping_table,
        "audit": _audit_table,
        "report": _report_table,
        "start": _start_table,
        "scores": _scores_table,
        "corruptions": _corruptions_table,
    }
    made = {
        name: _where(content) + "\n\n" + maker(content["rows"])
        for name, maker in makers.items()
        if (content := _read(results, name))
    }
    if content := _read(results, "scores"):
        made["checks"] = _checks_table(content["rows"])
    return made


def filled(page: str, made: Mapping[str, str]) -> str:
    """The page with each table between `<!-- name -->` and `<!-- /name -->`."""
    for name, table in made.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page = pattern.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", page)  # type: ignore[misc]
    return page


def draw(results: Path, images: Path) -> list[Path]:
    """Questions per second by questions per image, for training and decoding, as PNG files."""
    images.mkdir(parents=True, exist_ok=True)
    files = []
    for name, looks in (("train", LOOKS), ("decode", DECODE_LOOKS)):
        content = _read(results, name)
        if content:
            title = {"train": "Training", "decode": "Answering"}[name]
            files.append(_chart(content["rows"], looks, title, images / f"benchmark_{name}.png"))
    return files


def _chart(
    rows: Sequence[Mapping[str, Any]], looks: Mapping[str, tuple[str, str, str]], title: str, file: Path
) -> Path:
    """One panel for each family, a line for each way, bars from the slowest to the fastest round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = [family for family in FAMILIES if any(row["family"] == family for row in rows)]
    figure, panels = pyplot.subplots(
        1, len(families), figsize=(4.4 * len(families), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, family in zip(panels[0], families, strict=True):
        for way, (label, colour, marker) in looks.items():
            found = [row for row in rows if row["family"] == family and row["way"] == way]
            if not found:
                continue
            groups = [row["questions_per_image"] for row in found]
            speed = [row["questions_per_s"] for row in found]
            middle = [each["median"] for each in speed]
            bars = [
                [each["median"] - each["min"] for each in speed],
                [each["max"] - each["median"] for each in speed],
            ]
            panel.errorbar(groups, middle, bars, color=colour, marker=marker, capsize=3, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(sorted({row["questions_per_image"] for row in rows}))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_title(f"{title}, {FAMILIES[family]}")
        panel.set_xlabel("questions per image")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("questions per second")
    panels[0][0].legend(frameon=False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file


def _train_table(rows: Sequence[Mapping[str, Any]]) -> str:
    return _speed_table(rows, LOOKS, "Losses differ", lambda row: f"{row['loss_difference']:.0e}")


def _decode_table(rows: Sequence[Mapping[str, Any]]) -> str:
    return _speed_table(rows, DECODE_LOOKS, "Same answers", lambda row: f"{row['same_answers']:.0%}")


def _speed_table(
    rows: Sequence[Mapping[str, Any]],
    looks: Mapping[str, tuple[str, str, str]],
    last: str,
    value: Callable[[Mapping[str, Any]], str],
) -> str:
    lines = [f"{_HEAD} {last} |", _ALIGNED]
    for row in rows:
        lines.append(
            f"| {FAMILIES[row['family']]} | {row['questions_per_image']} | {looks[row['way']][0]} "
            f"| {_spread(row['questions_per_s'], 2)} | {row['tokens_per_s']['median']:,.0f} "
            f"| {row['real_tokens_share']:.1%} | {row['peak_gib']:.2f} GiB | {_times(row)} | {value(row)} |"
        )
    return "\n".join(lines)


def _labels_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| Model | Questions per image | Way | Questions/s | Tokens | Peak memory | Trees are | Differ by |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        way = {"trees": "labels as branches", "rows": "a row for each label"}[row["way"]]
        lines.append(
            f"| {FAMILIES[row['family']]} | {row['questions_per_image']} | {way} "
            f"| {_spread(row['questions_per_s'], 2)} | {row['tokens']:,} | {row['peak_gib']:.2f} GiB "
            f"| {_times(row)} | {row['difference']:.0e} |"
        )
    return "\n".join(lines)


def _options_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| Model | Option | Questions/s | Peak memory | The default is | Losses differ |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {FAMILIES[row['family']]} | {row['way']} | {_spread(row['questions_per_s'], 2)} "
            f"| {row['peak_gib']:.2f} GiB | {_times(row, 'default')} | {row['loss_difference']:.0e} |"
        )
    return "\n".join(lines)


def _where_table(rows: Sequence[Mapping[str, Any]]) -> str:
    kinds = sorted({kind for row in rows for kind in row["kinds_s"]})
    lines = [
        "| Model | Pack, images drawn | Pack, first time | Compute "
        + "".join(f"| {kind} " for kind in kinds)
        + "|",
        "|---|--:|--:|--:" + "|--:" * len(kinds) + "|",
    ]
    for row in rows:
        whole = sum(row["kinds_s"].values())
        shares = "".join(f"| {row['kinds_s'].get(kind, 0) / whole:.0%} " for kind in kinds)
        lines.append(
            f"| {FAMILIES[row['family']]} | {row['data_s']:.2f} s | {row['data_first_s']:.2f} s "
            f"| {row['compute_s']:.2f} s {shares}|"
        )
    return "\n".join(lines)


def _checkpoint_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| Model, tune | Trained parameters | Checkpoint | Written | In | An ordinary step "
        "| Its step waits, in steps | In all it costs, in steps |",
        "|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        way = {"background": "in the background", "waiting": "while training waits"}[row["way"]]
        lines.append(
            f"| {FAMILIES[row['family']]}, {row['tune']} | {row['trained_parameters'] / 1e6:.1f} million "
            f"| {row['mib']:,.1f} MiB | {way} | {_spread(row['written_s'], 2)} s "
            f"| {_spread(row['step_s'], 2)} s | {_spread(row['waited_steps'], 2)} "
            f"| {_spread(row['cost_steps'], 2)} |"
        )
    return "\n".join(lines)


def _plan_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| Questions | Order of an epoch | Memory for it | Share of a step |", "|--:|--:|--:|--:|"]
    lines += [
        f"| {row['questions']:,} | {row['order_s']:.2f} s | {row['order_peak_mib']:.0f} MiB "
        f"| {row['share_ms_per_step']:.2f} ms |"
        for row in rows
        if "order_s" in row
    ]
    lines += [
        "",
        "| Data, canvas, step | Micro-batches per step | Filled | Filled before a step's last |",
        "|---|--:|--:|--:|",
    ]
    for row in rows:
        if "setting" in row:
            before = row["filled_before_the_last"]
            lines.append(
                f"| {row['setting']} | {row['micro_batches_per_step']:.1f} | {row['filled']:.0%} "
                f"| {f'{before:.0%}' if before else ''} |"
            )
    for row in rows:
        if "tokenize_s" in row:
            each = 1000 * row["tokenize_s"] / row["different_questions"]
            lines += [
                "",
                f"{row['different_questions']:,} questions that are all different: tokenized and checked in "
                f"{row['tokenize_s']:.1f} s, {each:.2f} ms each.",
            ]
    return "\n".join(lines)


def _audit_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| What | Seconds | Seconds of processors | Images decoded | Load before |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['way']} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['decoded']:,} "
        f"| {row['load']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _report_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| Page | Seconds | Seconds of processors | Size | Longer side of pictures | Ready | A search |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        opened = [f"{row[key]:.2f} s" if key in row else "" for key in ("ready_s", "search_s")]
        side = f"{row['side']} pixels" if row["side"] else ""
        cells = [row["way"], f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['mb']:.1f} MB"]
        lines.append(f"| {' | '.join([*cells, side, *opened])} |")
    return "\n".join(lines)


def _start_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| What | Code | Seconds | Seconds of processors | Peak memory of each process | Load before |",
        "|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['what']} | {row['code']} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} "
        f"| {', '.join(f'{peak:.2f}' for peak in row['peak_gib'])} GiB | {row['load']:.1f} |"
        for row in rows
        if "cpu_seconds" in row
    ]
    if signals := [row for row in rows if "signal_after" in row]:
        lines += [
            "",
            "| SIGTERM | Code | Seconds until no process is left | Load before |",
            "|---|---|--:|--:|",
        ]
        lines += [
            f"| {row['what'].replace(' to step 1', '')}, after {row['signal_after']:.0f} s "
            f"| {row['code']} | {row['seconds']:.1f} | {row['load']:.1f} |"
            for row in signals
        ]
    return "\n".join(lines)


def _grouping_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| At the same | Questions per image | Questions trained on | Seconds | Exact match by seed | Mean |",
        "|---|--:|--:|--:|---|--:|",
    ]
    groups = sorted({row["questions_per_image"] for row in rows}, reverse=True)
    for compared in ("questions", "time"):
        for group in groups:
            found = [
                row
                for row in rows
                if row["questions_per_image"] == group and (row["compared"] == compared or group == groups[0])
            ]
            exact = [100 * row["exact"] for row in found]
            lines.append(
                f"| {compared} | {group} | {fmean(row['questions'] for row in found):,.0f} "
                f"| {fmean(row['seconds'] for row in found):.0f} "
                f"| {', '.join(f'{value:.1f} %' for value in exact)} | {fmean(exact):.1f} % |"
            )
    return "\n".join(lines)


def _scores_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| Answers | Predictions | Images | Values with intervals | Sums | Resamples | By the clock |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['answers']} | {row['predictions']:,} | {row['images']:,} | {row['scores']} "
        f"| {row['sums_cpu_s']:.1f} s | {_spread(row['resamples_cpu_s'], 1)} s "
        f"| {_spread(row['resamples_s'], 1)} s |"
        for row in rows
        if "answers" in row
    ]
    return "\n".join(lines)


def _checks_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| Score | Reference | Values | Largest difference | Held by, in `tests/` |",
        "|---|---|--:|--:|---|",
    ]
    for row in rows:
        if "reference" not in row:
            continue
        versions = "".join(f"; {name} {number}" for name, number in row["versions"].items())
        file, _, test = row["test"].partition("::")
        lines.append(
            f"| {row['scores']} | {row['reference']}{versions} | {row['values']:,} "
            f"| {row['difference']:.0e} | `{file}`: `{test}` |"
        )
    return "\n".join(lines).replace("0e+00", "0")


def _corruptions_table(rows: Sequence[Mapping[str, Any]]) -> str:
    sizes = list(dict.fromkeys((row["width"], row["height"]) for row in rows))
    lines = [
        "| Kind " + "".join(f"| {width:,} × {height:,} " for width, height in sizes) + "|",
        "|---" + "|--:" * len(sizes) + "|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        lines.append(f"| {kind} " + "".join(f"| {_spread(row['seconds'], 2)} s " for row in own) + "|")
    return "\n".join(lines)


def _data_table(rows: Sequence[Mapping[str, Any]]) -> str:
    workers = list(rows[0]["delivered"])
    lines = [
        "| Model | Source | Read, decode | Canvas | Patches | Together, one core "
        + "".join(f"| {number} workers " for number in workers)
        + "| Workers for 100 questions/s |",
        "|---|---|--:|--:|--:|--:|" + "--:|" * len(workers) + "--:|",
    ]
    for row in rows:
        stages = [_spread(speed, 1) for speed in row["stages"].values()]
        arriving = [_spread(row["delivered"][number], 1) for number in workers]
        width, height = row["source"]
        cells = [
            f"{FAMILIES[row['family']]}",
            f"{width} × {height}",
            *stages,
            *arriving,
            str(row["gpu_workers"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Mapping[str, float], digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}–{values['max']:.{digits}f})"


def _times(row: Mapping[str, Any], first: str = "trees") -> str:
    faster = row.get(f"{first}_times_as_fast")
    return f"{_spread(faster, 2)} × as fast" if faster else ""


def _where(content: Mapping[str, Any]) -> str:
    """The machine and versions of a result, as a sentence."""
    machine = content["machine"]
    processor = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rounds = content["settings"].get("rounds")
    repeated = f" Median of {rounds} rounds, least and most in brackets." if rounds else ""
    return f"{content['date']}, {processor}, {machine['threads']} threads; {versions}.{repeated}"


def _read(results: Path, name: str) -> dict[str, Any]:
    file = results / f"{name}.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.charts", description=__doc__.partition(":")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages and images/")
    given = parser.parse_args(argv)
    made = tables(given.results)
    pages = [given.docs / name for name in PAGES]
    for page in pages:
        page.write_text(filled(page.read_text(encoding="utf-8"), made), encoding="utf-8")
    for table in made.values():
        print(table, end="\n\n")
    for file in draw(given.results, given.docs / "images"):
        print(f"written: {file} ({file.stat().st_size / 1000:.0f} kB)")
    print(f"written: {', '.join(map(str, pages))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
