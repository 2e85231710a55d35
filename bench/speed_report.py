"""``bench/RESULTS.md`` from the speed bench's JSON: no figure comes from anywhere else."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CASES = ("tiny-flux", "flux-shaped")
BACKENDS = ("ort", "aoti", "inductor")
ASKED = {
    "of_ideal": 0.97,
    "share": 0.005,
    "over_eager": 2.0,
    "over_compiled": 1.0,
    "over_peer": 1.3,
    "cold latents": 1.0,
    "cold picture": 1.5,
    "overhead": 30.0,
}
ABOUT_CASE = {
    "tiny-flux": "The packaged model, trained, 128x128 pixels: 64 image and 24 text tokens, width 192, "
    "3 double and 6 single blocks.",
    "flux-shaped": "FLUX.1's block structure with random weights: width 768 (12 heads of 64), 4 double and 8 single blocks, 64 "
    "image tokens of 64 channels and 512 text tokens of 4,096, pooled 768, guidance embedding; FLUX.1-dev's sampling grid; "
    "conditions are noise from a seed. It draws nothing: PSNR is of the latents, with their range as peak, and says how "
    "near the uncached run is, not how a picture looks. On random weights FirstBlockCache may find nothing to skip; a cache "
    "that skipped nothing was run once.",
}
GPU_COLUMNS = {
    "seconds": "loop, s",
    "speedup": "× own uncached", "of_ideal": "of ideal", "over_eager": "× diffusers",
    "distance_from_eager": "distance from eager", "parity": "parity",
    "first_seconds": "first request, s",
}  # fmt: skip
Data = Mapping[str, Any]


def report(data: Data, pictures: Mapping[str, str]) -> str:
    """The whole page; a part that is missing is named."""
    parts = data["parts"]
    sections = ["# Speed\n", _setting(data)]
    sections += ["## What was asked\n", _verdicts(parts)]
    for case in CASES:
        sections += [f"## {case}\n", ABOUT_CASE[case] + "\n", *_case(parts, case, pictures)]
    sections += _growth(parts, pictures)
    sections += _session(parts)
    sections += ["## Compiling\n", _bundles(parts), "## On a GPU\n", _gpu(data["gpu"])]
    if data["missing"]:
        sections += ["## Not measured\n", "Parts that have not run: " + ", ".join(data["missing"]) + ".\n"]
    return "\n".join(sections)


def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


def _setting(data: Data) -> str:
    found = [part["facts"] for part in data["parts"].values()]
    if not found:
        return "Nothing has been measured.\n"
    dates = sorted({facts["date"] for facts in found})
    machines = sorted({f"{f['threads']} threads on {f['cores']} cores, {f['cpu']}, {f['memory_gib']} GiB" for f in found})
    versions = sorted({", ".join(f"{name} {version}" for name, version in f["versions"].items()) for f in found})
    pythons = sorted({facts["python"] for facts in found})
    minutes = sum(part.get("wall_seconds", 0.0) for part in data["parts"].values()) / 60
    quick = " **A quick run of the code with small sizes: these are no results.**" if data["quick"] else ""
    return (
        f"`make bench` (`python -m bench.speed`): {len(found)} parts, a process each, one after the other, "
        f"{minutes:.0f} minutes in all; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.{quick}\n\n"
        f"Hardware: {'; '.join(machines)}. Python {', '.join(pythons)}; {'; '.join(versions)}. float32, batch 1 unless said "
        "otherwise. Every figure is made from `bench/speed.json`. *Computed*: steps that ran the whole transformer, "
        "as hooks in its blocks counted them for the first prompt. A median stands before its quartiles (in brackets).\n"
    )


# What was asked -------------------------------------------------------------------------------------------------------------


def _verdicts(parts: Data) -> str:
    lines = [*_ideal_verdicts(parts), *_row_verdicts(parts), *_cold_verdict(parts), *_overhead_verdict(parts)]
    unmet = [line[0] for line in lines if line[-1] == "no"]
    if not lines:
        return "Nothing of it has been measured.\n"
    closing = "Each figure is met by at least one back end."
    if unmet:
        closing = (
            f"Not met by any back end: {'; '.join(unmet)}. *What one engine call takes* shows where a cached loop's time goes."
        )
    return table(["figure", "asked", "measured", "met"], lines) + f"\n{closing}\n"


def _verdict(name: str, asked: float, values: Mapping[str, float], *, least: bool = True, digits: int = 3) -> list[str]:
    """A line for ``values`` by back end; where only some of them meet what was asked, these are named."""
    meeting = [key for key, value in values.items() if (value >= asked if least else value <= asked)]
    met = "yes" if len(meeting) == len(values) else f"by {', '.join(meeting)}" if meeting else "no"
    shown = ", ".join(f"{key} {value:.{digits}f}" for key, value in values.items())
    return [name, f"{'≥' if least else '≤'} {asked:g}", shown, met]


def _ideal_verdicts(parts: Data) -> list[list[str]]:
    lines = []
    for case in CASES:
        found = {backend: part for backend in BACKENDS if (part := parts.get(f"pairs-{case}-{backend}"))}
        for index in range(4):
            values = {backend: part["pairs"][index]["of_ideal"]["median"] for backend, part in found.items()}
            if values:
                label = next(iter(found.values()))["pairs"][index]["name"]
                lines.append(_verdict(f"measured/ideal, {case}, {label}", ASKED["of_ideal"], values))
        shares = {backend: max(calls["share"] for calls in part["calls"].values() if "share" in calls)
                  for backend, part in found.items()}  # fmt: skip
        if shares:
            lines.append(_verdict(f"a forecast over a computed step, {case}", ASKED["share"], shares, least=False, digits=4))
    return lines


def _row_verdicts(parts: Data) -> list[list[str]]:
    lines = []
    if tiny := parts.get("rows-tiny-flux"):
        rows = {row["name"]: row for row in tiny["rows"]}
        names = {backend: f"cachec {backend}, uncached" for backend in BACKENDS}
        eager = {backend: rows[name]["over_diffusers"] for backend, name in names.items()}
        lines.append(_verdict("uncached over diffusers eager, tiny-flux", ASKED["over_eager"], eager, digits=2))
        if "torch.compile" in rows:
            compiled = {backend: value / rows["torch.compile"]["over_diffusers"] for backend, value in eager.items()}
            lines.append(_verdict("uncached over torch.compile, tiny-flux", ASKED["over_compiled"], compiled, digits=2))
    for case in CASES:
        if part := parts.get(f"rows-{case}"):
            compared = _peer_ratios(part["rows"])
            least = {backend: min(value for (one, _), value in compared.items() if one == backend) for backend in BACKENDS}
            lines.append(_verdict(f"least × any peer on its own steps, {case}", ASKED["over_peer"], least, digits=2))
    return lines


def _peer_ratios(rows: Sequence[Data]) -> dict[tuple[str, str], float]:
    """Seconds of a peer over those of a back end on the same computed steps."""
    seconds = {row["name"]: row["seconds"]["median"] for row in rows}
    return {
        (row["family"].removeprefix("cachec "), peer): seconds[peer] / row["seconds"]["median"]
        for row in rows
        for peer in row["beside"]
    }


def _cold_verdict(parts: Data) -> list[list[str]]:
    if not (cold := parts.get("cold-tiny-flux")):
        return []
    return [
        _verdict(f"process start to {mark}, tiny-flux, no torch, seconds", ASKED[f"cold {mark}"],
                 {"ort": cold["rows"][row]["later"]["seconds"][mark]}, least=False, digits=2)
        for row, mark in (("cachec ort", "latents"), ("cachec ort, text to picture", "picture"))
    ]  # fmt: skip


def _overhead_verdict(parts: Data) -> list[list[str]]:
    if not (part := parts.get("overhead")):
        return []
    most = {"null engines": max(row["call"]["median"] for row in part["rows"])}
    return [_verdict("session overhead, µs per engine call", ASKED["overhead"], most, least=False, digits=1)]


# A case ---------------------------------------------------------------------------------------------------------------------


def _case(parts: Data, case: str, pictures: Mapping[str, str]) -> list[str]:
    sections = []
    if rows := parts.get(f"rows-{case}"):
        sections += ["### Rows\n", _rows(rows, parts.get(f"cold-{case}")), _picture(pictures, f"rows-{case}")]
        sections += ["### On the peers' own steps\n", _peers(rows)]
    pairs = {backend: part for backend in BACKENDS if (part := parts.get(f"pairs-{case}-{backend}"))}
    if pairs:
        sections += ["### Measured over ideal\n", _pairs(pairs)]
        sections += ["### What one engine call takes\n", _calls(pairs, parts.get(f"products-{case}"))]
    if cold := parts.get(f"cold-{case}"):
        sections += ["### In a fresh process\n", _cold(cold)]
    return sections


def _picture(pictures: Mapping[str, str], name: str) -> str:
    return f"![{name}]({pictures[name]})\n" if name in pictures else ""


def _spread(value: Mapping[str, float] | None, digits: int = 4) -> str:
    if value is None:
        return "–"
    if value["low"] == value["high"]:  # a single run
        return f"{value['median']:.{digits}f}"
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}–{value['high']:.{digits}f})"


def _rows(part: Data, cold: Data | None) -> str:
    lines = []
    for row in part["rows"]:
        if row["beside"] and " on the steps of " in row["name"]:
            continue
        psnr = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        request = [_spread(row["request_seconds"], 3)] if part["pictures"] else []
        lines.append([
            row["name"], len(row["computed"]), _spread(row["seconds"]), *request, f"{row['speedup']:.2f}",
            f"{row['of_ideal']:.3f}", f"{row['over_diffusers']:.2f}", _row_memory(row, cold), psnr,
        ])  # fmt: skip
    whole = ["whole request, s"] if part["pictures"] else []
    header = ["row", "computed", "loop, s", *whole, "× own uncached", "of ideal", "× diffusers", "peak RSS, MiB", "PSNR, dB"]
    skipped = "".join(f"\n- Not run: {name}: {why}" for name, why in part["skipped"].items()) + "\n"
    return (
        f"{part['steps']} steps; rows take turns on the same prompts and noise ({part['requests']}), "
        f"{_count(part['repeats'], 'round')}; the peers in one process, each back end of cachec in one of its own. *Of ideal*: "
        "the speed-up over T/K, of medians far apart: the paired figure below is the better one. Peak RSS is of a process with "
        "that row alone (cachec's at the larger K, from a bundle, conditions from a file). PSNR against the row's own "
        "uncached run.\n\n" + table(header, lines) + skipped
    )  # fmt: skip


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _row_memory(row: Data, cold: Data | None) -> str:
    name = row["family"] if row["name"].startswith("cachec") else row["name"]
    if cold is None or name not in cold["rows"] or row["name"].endswith(", uncached"):
        return "–"
    return f"{cold['rows'][name]['later']['peak_rss'] / 2**20:.0f}"


def _peers(part: Data) -> str:
    rows, ratios = {row["name"]: row for row in part["rows"]}, _peer_ratios(part["rows"])
    mine = {(row["family"].removeprefix("cachec "), peer): row for row in part["rows"] for peer in row["beside"]}
    lines = []
    for peer in dict.fromkeys(peer for _, peer in ratios):
        theirs = rows[peer]
        psnr = [_psnr(theirs), _psnr(mine["ort", peer])]
        lines.append([peer, len(theirs["computed"]), _spread(theirs["seconds"]), *psnr,
                      *(f"{ratios[backend, peer]:.2f}" for backend in BACKENDS)])  # fmt: skip
    header = ["peer", "computed", "its loop, s", "its PSNR", "cachec's PSNR", *(f"× peer, {backend}" for backend in BACKENDS)]
    return (
        "cachec (hidden cut, Taylor of order 1) on the very steps that each peer chose; where a peer computed every step, "
        "cachec's uncached run. *× peer*: the peer's seconds over cachec's.\n\n" + table(header, lines)
    )  # fmt: skip


def _psnr(row: Data) -> str:
    return "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"


def _pairs(pairs: Mapping[str, Data]) -> str:
    lines = []
    for backend, part in pairs.items():
        for pair in part["pairs"]:
            calls = part["calls"][pair["name"]]["whole"]
            explained = calls["compute"] / sum(calls.values())
            lines.append([f"{backend}, {pair['name']}", len(pair["ratios"]), f"{pair['ideal']:.2f}", _spread(pair["ratio"], 2),
                          _spread(pair["of_ideal"], 3), f"{explained:.3f}"])  # fmt: skip
    header = ["row", "pairs", "ideal T/K", "measured, times as fast", "measured/ideal", "share of computed steps"]
    return (
        "An uncached and a cached run directly after each other, order alternating, one back end in the process; medians "
        "of the pairs' ratios. *Share of computed steps*: of a cached loop's time, from its trace; what is missing to "
        "1 is prologue, forecasts, and Python between calls. It bounds measured/ideal, but for the part of the prologue and "
        "the Python that the uncached run has, too.\n\n" + table(header, lines)
    )  # fmt: skip


def _calls(pairs: Mapping[str, Data], products: Data | None) -> str:
    lines = []
    for backend, part in pairs.items():
        own = _share(part, products) if backend == "ort" else "–"
        for name, facts in part["calls"].items():
            calls = facts["calls"]
            runs = ", ".join(f"{num}: {micro:.0f}" for num, micro in facts["forecasts"].items()) or "–"
            share = f"{100 * facts['share']:.2f} %" if "share" in facts else "–"
            advance = f"{calls['advance']:.0f}" if "advance" in calls else "–"
            step, once = f"{calls['compute']:.0f}", f"{calls.get('prologue', 0):.0f}"
            lines.append([f"{backend}, {name}", step, own, once, runs, share, advance, f"{facts['outside']:.0f}"])
    header = ["row", "computed step", "share of its own products", "prologue (once)", "one call of n forecasts, n: µs",
              "a forecast over a step", "advance", "Python per call"]  # fmt: skip
    return "Microseconds, medians, no other engine in the process.\n\n" + table(header, lines) + _products(products)


def _share(part: Data, products: Data | None) -> str:
    """Of the products in a step, with as many threads as ``part`` was measured with."""
    found = None if products is None else products["threads"].get(str(part["facts"]["threads"]))
    return "–" if found is None else f"{found['share']['median']:.2f}"


def _products(part: Data | None) -> str:
    if part is None:
        return ""
    lines = [
        [threads, found["pairs"], _spread(found["step_ms"], 2), _spread(found["products_ms"], 2), _spread(found["share"], 3)]
        for threads, found in part["threads"].items()
    ]
    return (
        "\n*Share of its own products*: the step's own matrix products, as one ONNX file of nothing else, over the step, on "
        "ONNX Runtime; processes of their own that take turns, medians of pairs.\n\n"
        + table(["threads", "pairs", "step, ms", "its products, ms", "share"], lines)
    )


def _cold(part: Data) -> str:
    lines = []
    for name, row in part["rows"].items():
        first, later = row["first"], row["later"]
        seconds = later["seconds"]
        cells = [
            f"{seconds[mark]:.2f}" if mark in seconds else "–" for mark in ("interpreter", "imported", "latents", "picture")
        ]
        lines.append([name, *cells, f"{max(first['seconds'].values()):.2f}", row["runs"], f"{later['peak_rss'] / 2**20:.0f}"])
    header = ["row", "interpreter", "imported", "first latents", "first picture", "the last of them, empty caches", "runs",
              "peak RSS, MiB"]  # fmt: skip
    whole = (
        "*Text to picture* is `cachec.load(…).generate(…)`: text encoders and decoder are the bundle's own, and for ort "
        "neither torch nor diffusers can be imported. "
        if any(name.endswith("text to picture") for name in part["rows"])
        else ""
    )
    return (
        "Seconds since the process was started, cumulative, as a user's script would do it; medians, without the first run "
        "of what compiles or remembers. *Empty caches*: that first run, with no compiled kernels and no known file hashes (a "
        "bundle's files above 64 MiB are hashed once per machine, smaller ones each time); files were in the page cache "
        "always. `cachec …` rows take the conditions from a file and make latents; for ort the process is checked to be free "
        f"of torch. {whole}cachec computes "
        f"{part['budget']} of {part['steps']} steps; a peer follows its own rule.\n\n" + table(header, lines)
    )  # fmt: skip


# Growth ---------------------------------------------------------------------------------------------------------------------


def _growth(parts: Data, pictures: Mapping[str, str]) -> list[str]:
    sections = []
    for name, title, write in (
        ("tokens", "image tokens", _tokens),
        ("steps", "computed steps", _steps),
        ("batch", "batch", _batch),
    ):
        if name in parts:
            sections += [f"## Cost by {title}\n", write(parts[name]), _picture(pictures, name)]
    return sections


def _tokens(part: Data) -> str:
    lines = []
    for row in part["rows"]:
        cells = [1e3 * row[key]["median"] for key in ("diffusers", "torch.compile", "ort", "forecast run")]
        share = row["forecast run"]["median"] / part["forecasts"] / row["ort"]["median"]
        lines.append([row["tokens"], *(f"{value:.2f}" for value in cells), f"{100 * share:.2f} %"])
    header = [
        "image tokens",
        "diffusers",
        "torch.compile",
        "cachec ort",
        f"{part['forecasts']} forecasts",
        "a forecast over a step",
    ]
    return (
        f"tiny-flux at other resolutions, with its {part['text_tokens']} text tokens: milliseconds of one computed step, and "
        "of one call of the forecast engine (cachec ort).\n\n" + table(header, lines)
    )  # fmt: skip


def _steps(part: Data) -> str:
    budgets = sorted({row["budget"] for row in part["rows"]})
    cuts = dict.fromkeys(row["cut"] for row in part["rows"])
    found = {(row["cut"], row["budget"]): row for row in part["rows"]}
    lines = [[budget, *(_spread(found[cut, budget]) for cut in cuts)] for budget in budgets]
    return "tiny-flux, cachec ort, seconds of the loop; the last row computes every step.\n\n" + table(
        ["K", *(f"{cut} cut" for cut in cuts)], lines
    )


def _batch(part: Data) -> str:
    batches = sorted({row["batch"] for row in part["rows"]})
    names = list(dict.fromkeys(row["name"] for row in part["rows"]))
    found = {(row["name"], row["batch"]): row for row in part["rows"]}
    lines = []
    for batch in batches:
        slow, fast = (found[name, batch] for name in names)
        each = [f"{row['median'] / batch:.4f}" for row in (slow, fast)]
        lines.append([batch, _spread(slow), _spread(fast), *each, f"{slow['median'] / fast['median']:.2f}"])
    header = ["batch", *(f"{name}, s" for name in names), *(f"{name}, s per picture" for name in names), "times as fast"]
    return "tiny-flux, cachec ort, the loop of a whole batch.\n\n" + table(header, lines)


# The session ----------------------------------------------------------------------------------------------------------------


def _session(parts: Data) -> list[str]:
    written = [write(parts[name]) for name, write in (("overhead", _overhead), ("requests", _requests), ("slots", _slots))
               if name in parts]  # fmt: skip
    return ["## The session, tiny-flux\n", *written] if written else []


def _overhead(part: Data) -> str:
    lines = [[row["name"], row["calls"], _spread(row["call"], 2), _spread(row["start"], 0)] for row in part["rows"]]
    return "Microseconds of Python with engines that do nothing. *Start*: a request's checks and copies.\n\n" + table(
        ["program", "calls", "µs per engine call", "start, µs"], lines
    )


def _requests(part: Data) -> str:
    before, after = part["before"] / 2**20, part["after"] / 2**20
    return (
        f"Resident memory over {part['requests']} requests (cachec ort, hidden cut, {part['budget']} computed steps): "
        f"{before:.1f} MiB after the first 50, {after:.1f} MiB at the end.\n"
    )


def _slots(part: Data) -> str:
    lines = [
        [row["cut"], row["slots"], f"{row['bytes'] / 2**10:.0f}", f"{row['psnr_db']:.2f}",
         f"{row['psnr_from_float32']:.1f}" if "psnr_from_float32" in row else "–", _spread(row["seconds"])]
        for row in part["rows"]
    ]  # fmt: skip
    return (
        f"Slots of half precision (`--slots float16`), {part['budget']} computed steps, {part['prompts']} held-out captions, "
        "PSNR in dB.\n\n" + table(["cut", "slots", "KiB", "against uncached", "against float32 slots", "loop, s"], lines)
    )


# Compiling and GPU ----------------------------------------------------------------------------------------------------------


def _bundles(parts: Data) -> str:
    found = [part for case in CASES for backend in BACKENDS if (part := parts.get(f"bundles-{case}-{backend}"))]
    lines = [
        [f"{part['case']}, {part['backend']}", f"{part['wall_seconds']:.0f}", f"{part['seconds']:.0f}",
         f"{part['stages']['build engines']:.0f}", f"{part['bytes'] / 2**20:.1f}", f"{part['peak_rss'] / 2**20:.0f}"]
        for part in found
    ]  # fmt: skip
    header = ["bundle", "process, s", "compiling, s", "of it engines, s", "bundle, MiB", "peak RSS, MiB"]
    return (
        "What `cachec compile --method taylor` does, in a process of its own: *process* counts importing and loading (and, "
        "the first time, making the random weights), *compiling* runs from the loaded model to the checked "
        "bundle. inductor's bundle holds graphs; it compiles them when they first run (*empty caches* above).\n\n"
        + table(header, lines)
    )  # fmt: skip


def _gpu(gpu: Any) -> str:
    if gpu is None:
        return (
            "Nothing has run on a GPU. `python -m bench.gpu_check --out bench/gpu.json` is the one command for that; its rows "
            "then stand here.\n"
        )
    setting = gpu["setting"]
    where = f"{setting['gpu']}, CUDA {setting['cuda']}" if "gpu" in setting else f"On {setting['device']}"
    versions = ", ".join(f"{name} {number}" for name, number in setting["packages"].items() if number)
    pages = [
        f"{where}, {setting['started']} (`python -m bench.gpu_check`, `bench/gpu.json`); "
        f"{versions}. Seconds are medians of runs that took turns, batch 1, with the device synchronised around each. "
        "The caches of diffusers and cache-dit ran op by op, as they do unless told otherwise.\n"
    ]
    for case in gpu["cases"]:
        lines = [
            [row["row"], row["steps"], len(row["computed"]), *(_plain(row.get(key)) for key in GPU_COLUMNS)]
            for row in case["rows"]
        ]
        header = ["row", "steps", "computed", *GPU_COLUMNS.values()]
        pages += [f"### {case['case']}, {case['dtype']}\n", table(header, lines)]
    left_out = [f"- {one['section']}: {one['status']}, {one['reason']}" for one in gpu["sections"] if one["status"] != "ok"]
    return "\n".join([*pages, *(["Left out or failed:\n", *left_out, ""] if left_out else [])])


def _plain(value: float | bool | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else {True: "yes", False: "no"}[bool(value)]
