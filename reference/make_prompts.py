"""Write the prompt lists of tiny-flux: ``python -m reference.make_prompts``. Evaluation prompts are held-out captions."""

from pathlib import Path

from reference.dataset import scenes

OUT = Path(__file__).parent.parent / "compiler" / "calibration" / "prompts"


def main() -> None:
    for use, num, seed in (("train", 96, 101), ("eval", 64, 202)):
        stream, captions = scenes(seed, held_out=use == "eval"), []
        while len(captions) < num:
            caption = next(stream).caption()
            if caption not in captions:
                captions.append(caption)
        (OUT / f"shapes-{use}.txt").write_text("\n".join(captions) + "\n")


if __name__ == "__main__":
    main()
