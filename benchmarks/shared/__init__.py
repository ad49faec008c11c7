"""What suites and reports share: the standard job, the operators' inputs, checks, and timing."""
