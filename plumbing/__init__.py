"""What no paper describes, a module a job. Each imports only modules before it in tests/test_layout.py's
list."""
