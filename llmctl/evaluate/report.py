"""A report on results files: a table of every model's numbers, and plots, as Markdown, one HTML file or JSON."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import CalledWrongly
from llmctl.evaluate import results
from llmctl.evaluate.results import Section
from llmctl.evaluate.run import notes
from llmctl.evaluate.summary import Number, summarize
from llmctl.files import refuse_existing, refuse_input, write_atomic
from llmctl.plotting import page, svg
from llmctl.quantities import format_count

FORMATS = (".md", ".html", ".json")


@dataclass(frozen=True)
class Part:
    """One model's numbers of one task."""

    model: str
    section: Section
    numbers: list[Number]


def write(path: str, files: Sequence[str], overwrite: bool = False) -> None:
    """Report on results files under `path`; Markdown has its plots as .svg beside it. Raises CalledWrongly for its name."""
    if not files:
        raise CalledWrongly("--report takes results files", hint="llmctl eval MODEL --task NAME -o FILE writes them")
    kind = Path(path).suffix
    if kind not in FORMATS:
        raise CalledWrongly(f"{path}: expected a name ending in {', '.join(FORMATS)}")
    refuse_existing(path, overwrite)
    refuse_input(path, files)
    parts = list(_parts(files))
    if kind == ".json":
        write_atomic(path, (json.dumps(_as_json(parts), indent=2, ensure_ascii=False) + "\n").encode())
    elif kind == ".html":
        drawn = "\n".join(f"<figure>{plot}</figure>" for plot in _plots(parts))
        page.save("Evaluation", f"{_html_table(parts)}\n{drawn}\n{_html_notes(parts)}", path, overwrite)
    else:
        _write_markdown(Path(path), parts)


def _parts(files: Sequence[str]) -> Iterator[Part]:
    sections = [(file, section) for file in files for section in results.read(file)]
    counts = Counter((_name(section), section.task) for _, section in sections)
    # Two runs of one name, such as checkpoints of the same step, are told apart by their files.
    alike = {name for (name, _), count in counts.items() if count > 1}
    for file, section in sections:
        name = _name(section)
        numbers = summarize(section.task, section.run["task_kind"], section.run["metrics"], section.records)
        yield Part(f"{name}, {file}" if name in alike else name, section, numbers)


def _name(section: Section) -> str:
    size = section.run.get("parameters")
    return Path(section.run["model"]).name + (f" ({format_count(size)})" if size else "")


def _rows(parts: Sequence[Part]) -> Iterator[tuple[list[str], dict[str, Number]]]:
    """What is measured (task, group, metric), and each model's number of it."""
    table: dict[tuple[str, str, str], dict[str, Number]] = {}
    for part in parts:
        for number in part.numbers:
            table.setdefault((number.task, number.group or "", number.metric), {})[part.model] = number
    for key, by_model in table.items():
        yield list(key), by_model


def _cell(number: Number | None) -> str:
    if number is None:
        return ""
    error = "" if number.stderr is None else f" ± {number.stderr:.4f}"
    return f"{number.value:.4f}{error} ({number.n})"


def _models(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(part.model for part in parts))


def _write_markdown(path: Path, parts: Sequence[Part]) -> None:
    models = _models(parts)
    lines = ["# Evaluation", "", "Values ± standard error (items).", ""]
    lines += ["| task | group | metric | " + " | ".join(models) + " |", "| --- " * (3 + len(models)) + "|"]
    for key, by_model in _rows(parts):
        lines.append("| " + " | ".join([*key, *(_cell(by_model.get(model)) for model in models)]) + " |")
    for number, plot in enumerate(_plots(parts), 1):
        name = f"{path.stem}-{number}.svg"
        write_atomic(path.with_name(name), plot.encode())
        lines += ["", f"![plot {number}]({name})"]
    lines += ["", *(f"- {note}" for note in _notes(parts))]
    write_atomic(path, ("\n".join(lines).rstrip() + "\n").encode())


def _html_table(parts: Sequence[Part]) -> str:
    models = _models(parts)
    rows = [["task", "group", "metric", *models]]
    rows += [[*key, *(_cell(by_model.get(model)) for model in models)] for key, by_model in _rows(parts)]
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<p>Values ± standard error (items).</p>\n<table border="1" cellspacing="0" cellpadding="4">\n{cells}</table>'
    )


def _notes(parts: Sequence[Part]) -> list[str]:
    return [f"{part.model}, {part.section.task}: {note}" for part in parts for note in notes(part.section.records)]


def _html_notes(parts: Sequence[Part]) -> str:
    return "".join(f"<p>{html.escape(note)}</p>\n" for note in _notes(parts))


def _as_json(parts: Sequence[Part]) -> list[dict]:
    return [
        {
            "model": part.model,
            "run": part.section.run,
            "numbers": [number.as_dict() for number in part.numbers],
            "notes": notes(part.section.records),
        }
        for part in parts
    ]


def _plots(parts: Sequence[Part]) -> Iterator[str]:
    """Shares as bars by task; of each suite its rates over what it varies."""
    models, shares = _models(parts), []
    for model in models:
        numbers = [n for part in parts if part.model == model for n in part.numbers if n.group is None]
        numbers = [number for number in numbers if 0 <= number.value <= 1 and number.metric != "rmse"]
        if numbers:
            names = [f"{number.task} {number.metric}" for number in numbers]
            shares.append(svg.Series(model, names, [n.value for n in numbers], [n.stderr for n in numbers]))
    if shares:
        yield svg.bars("", shares, "share")
    yield from _curves(parts)


def _curves(parts: Sequence[Part]) -> Iterator[str]:
    """Numbers of groups named `NAME VALUE NAME VALUE`: lines over the value of each name, and over the models' size."""
    table: dict[tuple[str, str, str], dict[str, list[tuple[float, Number]]]] = {}
    sizes = {part.section.run.get("parameters") for part in parts}
    for part in parts:
        for number in part.numbers:
            words = (number.group or "").split(" ")
            if len(words) != 4 or not (words[1].isdigit() and words[3].isdigit()):
                continue
            first, second = " ".join(words[:2]), " ".join(words[2:])
            places = [(words[2], words[3], f"{part.model} {first}"), (words[0], words[1], f"{part.model} {second}")]
            if len(sizes) > 1 and None not in sizes:
                places.append(("parameters", part.section.run["parameters"], number.group))
            for axis, x, label in places:
                lines = table.setdefault((number.task, number.metric, axis), {})
                lines.setdefault(label, []).append((float(x), number))
    for (task, metric, axis), by_label in table.items():
        series = []
        for label, points in by_label.items():
            points.sort(key=lambda point: point[0])
            values, errors = [n.value for _, n in points], [n.stderr for _, n in points]
            series.append(svg.Series(label, [x for x, _ in points], values, errors))
        yield svg.lines(f"{task}  ", series, axis, metric)
