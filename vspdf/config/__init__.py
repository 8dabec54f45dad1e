"""Every setting, its default, and whether it can be. No torch."""

from vspdf.config.loading import load as load
from vspdf.config.resolved import ResolvedConfig as ResolvedConfig
from vspdf.config.settings import Config as Config
from vspdf.config.settings import PhaseConfig as PhaseConfig
