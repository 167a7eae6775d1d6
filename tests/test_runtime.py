"""Precision, stop signals, import paths: what is asked of the machine."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from pretrain.runtime import StopSignals, has_fast_bf16, resolve_precision

CPU = torch.device("cpu")


def test_auto_precision_is_bf16_where_it_is_native() -> None:
    assert resolve_precision("auto", CPU) == ("bf16" if has_fast_bf16(CPU) else "fp32")
    assert resolve_precision("fp32", CPU) == "fp32"


def test_fp16_needs_cuda() -> None:
    with pytest.raises(ValueError, match=r"train.precision: fp16 needs a CUDA device.*use bf16 or fp32"):
        resolve_precision("fp16", CPU)


def test_signals_become_a_flag_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(("SIGTERM", "SIGINT")) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_does_not_wait() -> None:
    with StopSignals(("SIGINT",)) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
