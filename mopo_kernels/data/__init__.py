"""Preference data: the schema, loaders for published data sets, the collator, and what the labels say."""

from mopo_kernels.data.collator import PreferenceCollator
from mopo_kernels.data.dataset import PreferenceData, merge_preferences
from mopo_kernels.data.loaders import load_preferences
from mopo_kernels.data.report import PreferenceReport, WinRates, summarize, win_rates
from mopo_kernels.data.schema import DataError, PreferenceExample, PreferencePair

__all__ = [
    "DataError",
    "PreferenceCollator",
    "PreferenceData",
    "PreferenceExample",
    "PreferencePair",
    "PreferenceReport",
    "WinRates",
    "load_preferences",
    "merge_preferences",
    "summarize",
    "win_rates",
]
