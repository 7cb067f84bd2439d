"""One request over thousands of files: a job file, a ledger of what is done, and runs that go on where the last one ended."""
