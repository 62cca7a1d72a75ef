"""What an editor shows of LavenderTrainer: every argument of SFTTrainer, by name and with the same default."""

from __future__ import annotations

import inspect

from trl import SFTTrainer

from lavender import LavenderTrainer

OURS = {"self", "model", "args", "maps", "processing_class"}


def test_every_argument_of_trls_trainer_is_named():
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (LavenderTrainer, SFTTrainer))
    assert ours.keys() == theirs.keys() | OURS
    for name in theirs.keys() - OURS:
        assert ours[name].default == theirs[name].default
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert [name for name, one in ours.items() if one.annotation is one.empty] == ["self"]
