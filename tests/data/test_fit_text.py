"""Fitting a text tokeniser: to which fields, and what is said of those that there are not."""

import runpy
from pathlib import Path

import pytest
from rich.console import Console

from openpi_like.data.sentencepiece_model import SentencePieceTokenizer
from openpi_like.models.plan_text import Characters

FIT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "data" / "fit_text.py"), run_name="fit_text")


def test_all_fields_are_fitted_to_and_missing_ones_named(toy, tmp_path):
    out, console = tmp_path / "text.model", Console(quiet=True)
    FIT["main"](FIT["Args"](data=(toy,), out=out, vocab_size=400), console)
    assert SentencePieceTokenizer.of(out.read_bytes()).vocab_size <= 400
    FIT["main"](FIT["Args"](data=(toy,), out=out, vocab_size=400, waypoints=True), console)
    assert Characters.of(SentencePieceTokenizer.of(out.read_bytes())) == Characters.fitted()
    with pytest.raises(SystemExit, match=r"has no text field 'subtask', .*'langage_instruction', did you mean"):
        FIT["main"](FIT["Args"](data=(toy,), out=out, keys=("subtask", "langage_instruction")), console)
