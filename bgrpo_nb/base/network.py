"""With whom the package speaks over the network: with nobody, unless somebody is logged in to W&B or asked for it.

This is found out without a network and without importing wandb."""
import os
from urllib.parse import urlparse


def logged_in():
    "Is there a W&B key for the server in use, and is W&B not switched off?"
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"): return False
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"): return True
    import netrc
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try: return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError): return False


def wandb_mode():
    "online, offline or disabled: what `WANDB_MODE` asks for, else online for somebody who is logged in"
    return os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")


def report_nothing():
    "To be called before they are imported: libraries send no counts to Hugging Face, and no errors to W&B if offline"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if wandb_mode() not in ("online", "shared"): os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
