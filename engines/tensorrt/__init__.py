"""TensorRT: engines built on the machine that runs them, one per graph, one static profile per variant."""
