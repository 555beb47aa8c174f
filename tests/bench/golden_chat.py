"""Writes tests/data/golden/chat.json: what transformers makes of conversations, by the tokenizer of tests/data/chat.py.

In an environment of its own, since nothing else needs transformers; from the repository's root:

    python3 -m venv hf && hf/bin/pip install transformers jinja2 && hf/bin/python tests/bench/golden_chat.py

Each case has the template's name, the messages, the text, and its ids; `plain` are texts in which the names of special
tokens are text like any other.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.data import chat

SYSTEM = "You are a helpful assistant."
ASKED = (
    "What action should the robotic arm take to open the drawer",
    " Öffne die Schublade,\n2 mm weit! 🤖 ",
    "",
)
PLAIN = (*ASKED, "<|im_end|> and <image>", "a  b\t\n\n", "\u2581 \ufffd \0")


def parts(text: str, images: int = 0) -> list[dict[str, Any]]:
    return [{"type": "image"}] * images + [{"type": "text", "text": text}]


def conversations() -> list[tuple[str, list[dict[str, Any]]]]:
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for asked in ASKED:
        for name in ("qwen", "smol"):
            for images in range(3):
                user = {"role": "user", "content": parts(asked, images)}
                found += [(name, [user]), (name, [{"role": "system", "content": parts(SYSTEM)}, user])]
        system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}
        found += [("qwen", [system, user]), ("text", [system, user]), ("text", [user])]
    return [*found, ("text", [{"role": "user", "content": "json"}] * 5)]


def main() -> None:
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = {
            name: transformers.AutoTokenizer.from_pretrained(chat.write(Path(folder, name), template))
            for name, template in chat.TEMPLATES.items()
        }
    for name, messages in conversations():
        options = {"add_generation_prompt": True}
        text = tokenizers[name].apply_chat_template(messages, tokenize=False, **options)
        ids = tokenizers[name].apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        cases.append({"template": name, "messages": messages, "text": text, "ids": ids})
    plain = []
    for text in PLAIN:
        ids = tokenizers["qwen"](text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        plain.append({"text": text, "ids": ids, "decoded": tokenizers["qwen"].decode(ids, skip_special_tokens=True)})
    path = Path(__file__).resolve().parents[1] / "data" / "golden" / "chat.json"
    path.parent.mkdir(exist_ok=True)
    rows = {"cases": cases, "plain": plain}
    lists = ",\n".join(f'"{name}": [\n' + ",\n".join(map(json.dumps, of)) + "\n]" for name, of in rows.items())
    path.write_text(f'{{"transformers": "{transformers.__version__}",\n{lists}}}\n')
    print(f"{len(cases)} conversations, {len(plain)} texts -> {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
