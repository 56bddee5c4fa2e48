"""What is private or replaced in DeepSpeed: still there, and still needed. Each test names the patch that can go."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from megallama.compat import deepspeed as compat
from tests.support.places import ROOT

ENGINE = "deepspeed.runtime.engine"
STAGE_2, STAGE_3 = "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.stage3"


def definition(module, name):
    """The function or class `name` (dotted) of a module, as its source says: decorators hide it from inspect."""
    node = ast.parse(inspect.getsource(importlib.import_module(module)))
    for word in name.split("."):
        (node,) = [part for part in node.body if getattr(part, "name", None) == word]
    return node


def words_of(module, name):
    """Source without spaces, so that line breaks do not count."""
    return "".join(ast.unparse(definition(module, name)).split())


def arguments_of(module, name):
    """Names of the arguments of a function."""
    return [argument.arg for argument in definition(module, name).args.args]


def test_the_version_is_the_one_that_was_read():
    assert version("deepspeed") == compat.VERSION, "read compat/deepspeed.py against the new version"


def printed_by(statement):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", statement],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"},
    )
    return result.stdout + result.stderr


def test_its_import_is_loud_and_ours_is_silent():
    assert printed_by("import deepspeed"), "the import is silent: drop what silences it"
    assert printed_by("import megallama.compat.deepspeed") == ""


def test_the_bf16_optimizer_prints_memory_whatever_the_log_level():
    assert "see_memory_usage('endbf16_optimizer',force=True)" in words_of(
        "deepspeed.runtime.bf16_optimizer", "BF16_Optimizer.__init__"
    )


def test_the_backend_compiles_an_all_reduce():
    backend = importlib.import_module("deepspeed.comm.torch")
    assert "build_shm_op()" in words_of("deepspeed.comm.torch", "TorchBackend.__init__")
    assert importlib.import_module("deepspeed").comm.torch is not backend, "it can be imported by its name"


def test_fp16_on_cpu_depends_on_one_dnn():
    assert "_is_mkldnn_fp16_supported" in words_of(
        "deepspeed.accelerator.cpu_accelerator", "CPU_Accelerator.is_fp16_supported"
    )


def test_the_order_of_fetches_is_compared_over_all_ranks():
    coordinator = ("deepspeed.runtime.zero.partitioned_param_coordinator", "PartitionedParameterCoordinator")
    assert "assert_ints_same_as_other_ranks(" in words_of(*coordinator)
    arguments = arguments_of("deepspeed.runtime.zero.utils", "assert_ints_same_as_other_ranks")
    assert arguments == ["ints"], "it takes a group"


def test_the_state_of_backward_hooks_is_cleared_in_the_forward_alone():
    assert "clear_backward_seen_flag()" in words_of(ENGINE, "DeepSpeedEngine.forward")
    prologue = words_of(ENGINE, "DeepSpeedEngine._backward_prologue")
    assert "clear_backward_seen_flag" not in prologue, "it does what at_begin does"
    for method in ("_backward_prologue", "_backward_epilogue"):
        assert f"self.{method}()" in words_of(ENGINE, "DeepSpeedEngine")
        assert arguments_of(ENGINE, f"DeepSpeedEngine.{method}") == ["self"]


def test_a_backward_without_scale_is_refused_under_fp16():
    words = words_of(ENGINE, "DeepSpeedEngine._backward_post_hook")
    assert "needs_scalerand(notself._manual_backward_expected)" in words


def test_gradients_are_reduced_as_wide_as_the_parameters():
    optimizer = "DeepSpeedZeroOptimizer"
    assert words_of(STAGE_2, f"{optimizer}._gradient_reduction_buffer_dtype").endswith("elseself.dtype")
    words = words_of(STAGE_2, optimizer)
    assert "self.process_gradients(param,i)" in words and "self.get_gradient_for_reduction(param)" in words
    assert arguments_of(STAGE_2, f"{optimizer}.process_gradients") == ["self", "param", "i"]


def test_stage_3_has_no_public_way_from_masters_to_weights():
    assert "defupdate_lp_params(self)" in words_of(STAGE_2, "DeepSpeedZeroOptimizer")
    optimizer = "DeepSpeedZeroOptimizer_Stage3"
    assert "defupdate_lp_params" not in words_of(STAGE_3, optimizer), "use it in publish_stage_3_masters"
    method = f"{optimizer}._reassign_or_swap_out_partitioned_parameters"
    assert arguments_of(STAGE_3, method) == ["self", "sub_group_id"]


@pytest.mark.parametrize("name", [*compat.DOUBLE_MODULES, "deepspeed.accelerator.cpu_accelerator"])
def test_a_module_names_fp32_where_it_means_the_wide_format(name):
    module = importlib.import_module(name)
    words = "".join(ast.unparse(ast.parse(inspect.getsource(module))).split())
    assert "torch.float32" in words or "torch.FloatTensor" in words or "torch.float," in words, (
        f"{name}: drop it"
    )
    compat.use_double(True)
    try:
        assert module.torch.float32 == torch.float64 and module.torch.bfloat16 == torch.bfloat16
    finally:
        compat.use_double(False)
    assert module.torch is torch


def test_the_smallest_loss_scale_raises_and_no_setting_changes_that():
    assert "raise_error_at_min_scale=True" in words_of(
        "deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"
    )
    config = inspect.getsource(importlib.import_module("deepspeed.runtime.config"))
    assert "raise_error_at_min_scale" not in config, "set it there, and drop it from initialize()"
