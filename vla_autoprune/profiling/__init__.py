"""Where the milliseconds, bytes and joules of a plan go: measured, compared, limited, and predicted."""
