"""ComfyUI nodes of Mimir. This list is the table of contents of the pack."""

from comfy_api.latest import ComfyExtension, io

from .compare import MimirCompare, MimirCompareFusions
from .conditioning import MimirLoadConditioning, MimirSaveConditioning
from .dataset import MimirCacheFeatures, MimirPrepareDataset, MimirWorldFeatures
from .decode import MimirVAEDecode, MimirVAEEncode
from .encode import MimirPhiEncode, MimirT5Encode
from .fuse import MimirTokenFuser
from .host import files
from .inspect_file import MimirInspectFile
from .inspect_tokens import MimirInspectTokens
from .latent import MimirEmptyLatent
from .load import MimirLoadFuser, MimirLoadModel, MimirLoadPhi, MimirLoadT5, MimirLoadTiny, MimirLoadVAE
from .lora import MimirLoadLora
from .plan import MimirPlan
from .sample import MimirSampler
from .token_gain import MimirPhiGain, MimirT5Gain
from .token_map import MimirTokenMap
from .train import MimirSaveFuser, MimirTrainFuser

NODES: list[type[io.ComfyNode]] = [
    MimirLoadTiny,
    MimirLoadModel,
    MimirLoadT5,
    MimirLoadPhi,
    MimirLoadFuser,
    MimirLoadVAE,
    MimirLoadLora,
    MimirInspectFile,
    MimirPlan,
    MimirT5Encode,
    MimirPhiEncode,
    MimirTokenFuser,
    MimirEmptyLatent,
    MimirSampler,
    MimirVAEDecode,
    MimirVAEEncode,
    MimirSaveConditioning,
    MimirLoadConditioning,
    MimirCompare,
    MimirCompareFusions,
    MimirPrepareDataset,
    MimirCacheFeatures,
    MimirWorldFeatures,
    MimirTrainFuser,
    MimirSaveFuser,
    MimirInspectTokens,
    MimirTokenMap,
    MimirT5Gain,
    MimirPhiGain,
]


class MimirExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ComfyExtension:
    files.register()
    return MimirExtension()
