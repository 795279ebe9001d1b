"""A short digest of a model's weights, so that predictions of a model that was trained again under the same name are not taken over."""

import hashlib

import torch

SAMPLED = 1024  # values of each tensor that are hashed: training changes all of them


def weights_digest(model: torch.nn.Module) -> str:
    """16 hex digits over names, shapes and evenly spaced values of all tensors; another dtype gives another digest."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or not tensor.numel():
            continue
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
