"""Fits a SentencePiece model to the instructions of RLDS datasets: the text tokeniser of a policy trained from scratch.

    python data/fit_text.py --data demos/sawyer_sim/1.0.0 demos/pusht_sim/1.0.0 --out text.model

Any other text can be encoded with it too, if need be byte by byte. Policies that start from released weights bring
their own tokeniser. `--state-in-prompt` also fits to what pi0.5 and policies with action tokens write around
instructions, `--keys language_instruction subtask` to what a policy writes before it acts, and `--waypoints` gives the
characters of written waypoints tokens of their own, see `openpi_like.models.plan_text.Characters.fitted`.
"""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console

from openpi_like.config import near_names
from openpi_like.data.index import open_index
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.data.text import TextTokenizer
from openpi_like.driving.waypoint_text import CHARACTERS


@dataclasses.dataclass(frozen=True)
class Args:
    """Fits a SentencePiece model to the instructions of RLDS datasets.

    data: TFDS directories. out: file to write. keys: step fields, that of the instruction, and of other texts.
    state_in_prompt: for policies that read their state in the prompt, see `openpi_like.data.prompts`. waypoints: for
    policies that write waypoints.
    """

    data: tuple[Path, ...]
    out: Path
    keys: tuple[str, ...] = ("language_instruction",)
    split: str = "train"
    vocab_size: int = 512
    state_in_prompt: bool = False
    waypoints: bool = False
    index_dir: Path | None = None


def main(args: Args, console: Console) -> None:
    texts: set[str] = set()
    for directory in args.data:
        index = open_index(directory, args.split, index_dir=args.index_dir)
        known = list(index.texts)
        if unknown := [key for key in args.keys if key not in known]:
            near = "; ".join(f"{key!r}, {near_names(key, known)}" for key in unknown)
            raise SystemExit(f"{directory} has no text field {near}")
        texts.update(text for key in args.keys for text in index.texts[key].table)
    around = []
    if args.state_in_prompt:
        numbers = " ".join(map(str, range(10)))
        around = [f"Task: {text.lower()}, State: {numbers};" for text in texts]
        around += ["Action: ", "Subtask: ;", "|", "Next action:"]
    symbols = CHARACTERS if args.waypoints else ""
    model = fit_text_tokenizer([*texts, *around], args.vocab_size, symbols=symbols)
    tokenizer = TextTokenizer(model, prompt_len=10_000)
    lengths = {text: int(tokenizer.encode(text)[1].sum()) for text in sorted(texts)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(model.content())
    for text, length in lengths.items():
        console.print(f"{length:4d} tokens  {text!r}")
    console.print(f"{len(texts)} texts, {tokenizer.vocab_size} tokens, longest {max(lengths.values())} -> {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args), Console(highlight=False))
