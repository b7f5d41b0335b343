"""The synthetic world, data readers, planning metrics, comparison and reports."""
