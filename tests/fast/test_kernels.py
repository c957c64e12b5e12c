"""The Triton kernels equal the torch forms, by Triton's interpreter; they compile for Hopper."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

if "TRITON_INTERPRET" not in os.environ:
    # Triton reads the variable when a kernel is defined: the module runs again in a process of its own.
    def test_in_the_interpreter() -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_kernels_compile_for_hopper() -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from halfbyte.fast import kernels

        x, f, i = "*bf16", "*fp32", "i32"
        rows = {"width": 4096, "block": 4096, "tile": 1}
        cases = [
            (kernels._norm_forward, [x, x, i, x, f, "fp32"], {"offset": 0.0, **rows}),
            (kernels._norm_backward, [x, x, i, x, f, x, x], {"offset": 1.0, "around": True, **rows}),
            (
                kernels._rotate,
                [x, x, x, *[i] * 7],
                {"half": 64, "step": 1, "gap": 64, "block": 64, "head_block": 64},
            ),
            (kernels._swiglu_forward, [x, x, i], {"block": 1024}),
            (kernels._swiglu_backward, [x, x, x, i], {"block": 1024}),
            (kernels._score, [x, "*i64", f, f, "*i1", i], {"softcap": 30.0, "gradient": True, "block": 4096}),
        ]
        for kernel, types, constants in cases:
            names = kernel.arg_names
            signature = {**dict(zip(names, types, strict=False)), **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(kernel, {n: signature[n] for n in names}, constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            assert ".target sm_90" in compiled.asm["ptx"]

else:
    from halfbyte.fast import gate, kernels, norm, rope, scores
    from tests.fast import models, test_layer

    DTYPES = [torch.float32, torch.bfloat16]

    def close(ours: torch.Tensor, exact: torch.Tensor) -> bool:
        """Within a rounding of the float32 result (the interpreter cuts to bfloat16) and of a sum."""
        assert ours.shape == exact.shape
        tolerance = 2e-6 if ours.dtype == torch.float32 else 2**-7
        return bool(((ours.float() - exact).abs() <= tolerance * exact.abs() + 1e-6).all())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("shape", "unit_offset"), [((3, 7, 100), False), ((2, 5, 4, 24), True)])
    def test_norm(shape: tuple[int, ...], unit_offset: bool, dtype: torch.dtype) -> None:
        x, dy, around = (torch.randn(shape).to(dtype) for _ in range(3))
        weight = torch.randn(shape[-1]).to(dtype)
        y, inverse = kernels.norm_forward(x, weight, 1e-6, unit_offset)
        exact, exact_inverse = norm.norm_forward(x.float(), weight.float(), 1e-6, unit_offset)
        assert y.dtype == dtype
        assert close(y, exact)
        assert close(inverse, exact_inverse)
        for residual in (None, around):
            dx = kernels.norm_backward(dy, x, inverse, weight, unit_offset, residual)
            floats = (dy.float(), x.float(), inverse, weight.float(), unit_offset)
            exact = norm.norm_backward(*floats, None if residual is None else residual.float())
            assert dx.dtype == dtype
            assert (dx.float() - exact).abs().max() <= 0.02 * exact.abs().max()
            if dtype == torch.float32:
                torch.testing.assert_close(dx, exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 2])
    def test_rotation(rows: int, dtype: torch.dtype) -> None:
        qkv = torch.randn(2, 5, 6, 20).to(dtype)
        angles = torch.rand(rows, 5, 1, 10)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        expected = rope.rotate_(qkv[:, :, :4].float(), cos.float(), sin.float())
        untouched = qkv[:, :, 4:].clone()
        ours = kernels.rotate_(qkv[:, :, :4], cos, sin)
        assert torch.equal(qkv[:, :, 4:], untouched)
        torch.testing.assert_close(
            ours.float(), expected, rtol=2**-7, atol=2**-7 if dtype == torch.bfloat16 else 1e-6
        )

    @pytest.mark.parametrize("pairing", rope.PAIRINGS)
    def test_rotation_of_a_part_of_the_head(pairing: rope.Pairing, monkeypatch: pytest.MonkeyPatch) -> None:
        """As each family pairs channels, and in float32 where the model keeps its angles so."""
        heads = torch.randn(2, 5, 4, 20).bfloat16()
        angles = torch.rand(1, 5, 12)
        rotary = rope.Rotary(angles.cos(), angles.sin(), heads.dtype, pairing)
        expected = rotary.rotate_(heads.clone())
        monkeypatch.setattr(rope, "kernels", lambda x: kernels)
        ours = rotary.rotate_(heads.clone())
        assert torch.equal(ours[..., 12:], heads[..., 12:])
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=2**-7)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_swiglu(dtype: torch.dtype) -> None:
        gate_up, dy = torch.randn(3, 2 * 1100).to(dtype), torch.randn(3, 1100).to(dtype)
        swiglu = gate.Gate("silu")
        assert close(kernels.swiglu_forward(gate_up), swiglu.forward(gate_up.float()))
        gradient, again = kernels.swiglu_backward(dy.clone(), gate_up)
        exact, product = swiglu.backward(dy.float(), gate_up.float())
        assert close(again, product)
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(gradient.float(), exact, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("softcap", [None, 5.0])
    @pytest.mark.parametrize("vocabulary", [7, 300, 4096 + 500])
    def test_head(vocabulary: int, softcap: float | None, dtype: torch.dtype) -> None:
        logits = (4 * torch.randn(4, vocabulary)).to(dtype)
        logits[1] -= 80
        logits[2, 3:] = logits[2, 3]  # a tie: the first of them is the top one
        targets = torch.tensor([0, vocabulary - 1, 3, vocabulary // 2])
        told, exact_gradient = scores.score(logits.float().clone(), targets, softcap, True)
        ours = kernels.score(logits.clone(), targets, softcap, True)
        torch.testing.assert_close(ours[0], told["log_probs"], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(ours[1], told["entropy"], rtol=1e-5, atol=1e-5)
        assert torch.equal(ours[2], told["is_top1"])
        assert ours[3].dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(ours[3].float(), exact_gradient, rtol=tolerance, atol=1e-6)
        untouched = logits.clone()
        kernels.score(untouched, targets, softcap, False)
        assert torch.equal(untouched, logits)

    def test_log_probabilities_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
        targets, weight = torch.randint(96, (18,)), torch.randn(96, 16)
        hidden = torch.randn(18, 16)
        found = []
        for fused in (None, kernels):
            monkeypatch.setattr(scores, "kernels", lambda x, fused=fused: fused)
            x = hidden.clone().requires_grad_()
            told = scores.scores(x, weight, targets, None)
            (told.log_probs * torch.linspace(0, 1, 18)).sum().backward()
            found.append((told.log_probs.detach(), told.entropy, told.is_top1, x.grad))
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma"])
    def test_a_layer_on_the_kernels(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = test_layer.step(models.make(arch), test_layer.BATCHES["causal"])
        for module in (gate, norm, rope):
            monkeypatch.setattr(module, "kernels", lambda x: kernels)
        model = test_layer.fuse_all(models.make(arch), level=1)
        test_layer.assert_same(test_layer.step(model, test_layer.BATCHES["causal"]), expected)
