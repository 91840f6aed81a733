"""Finds the decoder's anatomy in an FX graph by data flow alone, and returns it as frozen records."""

from parvts_fx.analysis.decoder import find_decoder
from parvts_fx.analysis.records import Attention, Decoder, Layer, VisualMerge

__all__ = ["Attention", "Decoder", "Layer", "VisualMerge", "find_decoder"]
