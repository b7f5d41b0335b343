"""AutoPrune's mathematics: information, slope, retention curve, budget, schedule, buckets, selection."""
