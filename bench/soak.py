"""What damaged bundles, killed commands and odd requests do: ``make soak``, soak.json and the figures of docs/reliability.md.

Parts: ``manifests`` changes the JSON and the numbers of a bundle anyhow and opens it; ``files`` damages its files; ``kills``
ends commands by SIGKILL at random moments, looks at what is left, and gives the same command again; ``requests`` asks a server
for pictures, with malformed requests and clients that go away among the good ones. Each part runs in
processes of its own, and keeps the number of every case that did not do as it should. All but ``requests``, whose server is
watched from the first to the last, go on where they were interrupted; the logs know no model, so clear the work folder when
tiny-flux is another.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import click

from bench import soak_bundles, soak_kills, soak_requests
from bench.timing import facts

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "reliability.md"
SAYS = HERE / "soak.json"
BEGIN = "## Figures"
CHUNK = 250  # cases of one process
PATIENCE = 150.0  # seconds without a case done, or until the first: it hangs
PARTS = {"manifests": 10_000, "files": 2_000, "kills": 100, "requests": 11_000}
# A number for what each part does, raised with every change of it: by it figures of an earlier campaign are known.
CASES = {"manifests": 2, "files": 2, "kills": 1, "requests": 2}
ALONE = {"kills": soak_kills.run, "requests": soak_requests.run}  # which see to their own processes


def outcomes(part: str, bundle: Path, count: int, work: Path) -> Iterator[tuple[int, str]]:
    """(case, what came of it) of all cases, each done in some child; a child that dies or hangs is an outcome, too."""
    log = work / f"{part}.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    yield from ((case, said) for case, said in done)
    first = len(done)
    while first < count:
        last = min(first + CHUNK, count)
        command = [sys.executable, "-m", "bench.soak", "--child", part, "--bundle", str(bundle), "--cases", f"{first}:{last}"]
        for case, said in watched(command, first, last):
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps([case, said]) + "\n")
            yield case, said
            first = case + 1


def watched(command: list[str], first: int, last: int) -> Iterator[tuple[int, str]]:
    """What a child prints, a line a case; the case at which it ends early or falls silent is the last."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        expected, lines = first, Queue[str]()
        Thread(target=_read, args=(process, lines), daemon=True).start()
        try:
            while line := lines.get(timeout=PATIENCE):
                case, said = json.loads(line)
                yield case, said
                expected = case + 1
        except Empty:
            process.kill()
            yield expected, "hung"
            return
        if process.wait() != 0 or expected < last:
            yield min(expected, last - 1), f"the process ended with {process.returncode}"


def _read(process: "subprocess.Popen[str]", lines: "Queue[str]") -> None:
    """Its lines as they come, and an empty one at the end."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")


def run_part(part: str, bundle: Path, count: int, work: Path) -> dict[str, Any]:
    """Outcomes, counted; ``wrong`` are the cases with one that must not be."""
    start, seen = time.monotonic(), Counter[str]()
    wrong: list[list[Any]] = []
    for case, said in outcomes(part, bundle, count, work):
        seen[said if said in soak_bundles.RIGHT else "wrong"] += 1
        if said not in soak_bundles.RIGHT:
            wrong.append([case, said])
            click.echo(f"{part} {case}: {said}")
    return {"cases": count, "outcomes": dict(seen.most_common()), "wrong": wrong, "seconds": round(time.monotonic() - start)}


def child(part: str, bundle: Path, first: int, last: int) -> None:
    """Do the cases, printing a line for each."""
    cases: Callable[[Path, range], Iterator[tuple[int, str]]] = getattr(soak_bundles, part)
    for case, said in cases(bundle, range(first, last)):
        print(json.dumps([case, said]), flush=True)


def table(rows: dict[str, Any], where: dict[str, Any]) -> str:
    """The end of the page. What was played with other cases than today's :data:`CASES` is named."""
    lines = [BEGIN, "", f"`make soak`: {where['cpu']}, {where['cores']} cores, {where['date']}.", ""]
    if earlier := [f"`{part}`" for part, row in rows.items() if row["revision"] != CASES[part]]:
        lines += [f"Of an earlier campaign, whose cases were others than those described above: {', '.join(earlier)}.", ""]
    lines += ["| part | cases | what came of them | not as it should be |", "| --- | --- | --- | --- |"]
    for part, row in rows.items():
        said = ", ".join(f"{what} {count:,}" for what, count in row["outcomes"].items() if what != "wrong")
        lines.append(f"| {part} | {row['cases']:,} | {said} | {len(row['wrong'])} |")
    if "memory" in (left := rows.get("requests", {}).get("left", {})):
        lines += ["", f"`requests`: {soak_requests.marks(left)}"]
    return "\n".join([*lines, ""])


def keep(part: str, row: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write what came of a part to ``out``, beside the others, and to the page if that is its file; returns all parts."""
    kept = json.loads(out.read_text()) if out.exists() else {"parts": {}}  # another part may have been written meanwhile
    rows, where = {**kept["parts"], part: {"revision": CASES[part], **row}}, facts()
    out.write_text(json.dumps({"where": where, "parts": rows}, indent=1) + "\n")
    if out.resolve() == SAYS.resolve() and PAGE.exists():
        before = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0].rstrip()
        PAGE.write_text(f"{before}\n\n{table(rows, where)}", encoding="utf-8")
    return rows


@click.command()
@click.option("--child", "asked", type=click.Choice(["manifests", "files"]), hidden=True)
@click.option("--bundle", type=click.Path(path_type=Path), hidden=True)
@click.option("--cases", hidden=True)
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="All of them without.")
@click.option("--share", default=1.0, show_default=True, help="Of the number of cases.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/soak"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=SAYS, show_default=True)
def main(asked: str | None, bundle: Path, cases: str, parts: tuple[str, ...], share: float, work: Path, out: Path) -> None:
    """Damage bundles and kill commands, thousands of times."""
    if asked is not None:
        first, last = map(int, cases.split(":"))
        child(asked, bundle, first, last)
        return
    for part in parts or PARTS:
        count, played = max(2, round(share * PARTS[part])), work / f"{part}-{CASES[part]}"  # no log of other cases goes on
        played.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="cachec-soak-") as folder:
            if part in ALONE:
                row = ALONE[part](count, Path(folder), played)
            else:
                row = run_part(part, soak_bundles.make_bundle(Path(folder)), count, played)
        rows = keep(part, row, out)
    sys.exit(1 if any(row["wrong"] for row in rows.values()) else 0)


if __name__ == "__main__":
    main()
