"""AutoPrune for driving VLAs: visual tokens pruned inside the decoder, in static-shaped stages.

The package is light on purpose: importing it pulls in neither torch nor ONNX Runtime.
"""

__version__ = "0.1.0"
