"""Write the prompt lists of tiny-flux: ``python -m reference.make_prompts``. No two lists share a caption.

Those that are measured with, for levels and for evaluations, are captions that the model was never trained on.
"""

from pathlib import Path

from reference.dataset import scenes

OUT = Path(__file__).parent.parent / "compiler" / "calibration" / "prompts"
LISTS = (("train", 96, 101), ("eval", 64, 202), ("measure", 32, 303), ("choose", 96, 404))  # use, captions, seed


def make_lists() -> dict[str, list[str]]:
    """Captions by use."""
    lists: dict[str, list[str]] = {}
    taken: set[str] = set()
    for use, num, seed in LISTS:
        stream = scenes(seed, held_out=use in ("eval", "measure"))
        lists[use] = []
        while len(lists[use]) < num:
            caption = next(stream).caption()
            if caption not in taken:
                lists[use].append(caption)
                taken.add(caption)
    return lists


def main() -> None:
    for use, captions in make_lists().items():
        (OUT / f"shapes-{use}.txt").write_text("\n".join(captions) + "\n")


if __name__ == "__main__":
    main()
