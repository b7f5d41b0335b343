"""Frame to plan without torch: preprocess, vision, stages, decode, trajectory."""
