"""EasyAnimate in ComfyUI, as a client of the server of easyanimate_jax."""

from comfy_api.latest import ComfyExtension

from .nodes import NODES


class EasyAnimateExtension(ComfyExtension):
    """The nodes of this pack."""

    async def get_node_list(self):
        """Return the node classes."""
        return NODES


async def comfy_entrypoint() -> EasyAnimateExtension:
    """Return the extension; ComfyUI calls it."""
    return EasyAnimateExtension()
