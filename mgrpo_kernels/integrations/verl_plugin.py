"""What verl loads by itself: the entry point of the group ``verl.plugins``.

Importing this module is loading the plugin: verl asks for no more. It puts the fused head under verl's name and registers the losses
"mgrpo_kernels", "mgrpo_kernels_dppo_tv" and "mgrpo_kernels_dppo_kl"; verl's own losses stay as they are. verl logs a plugin's failure at
level DEBUG only and continues, so it is logged here, as an error. To have it end the process, name the module in
``VERL_USE_EXTERNAL_MODULES``; to have no plugin, set ``VERL_USE_EXTERNAL_PLUGINS=none``.
"""

from mgrpo_kernels.integrations import logger
from mgrpo_kernels.integrations.verl import patched

try:
    patch = patched(vanilla=False)
except Exception:
    logger.exception("mgrpo_kernels' plugin for verl did not load, and verl continues without the fused head and loss")
    raise
