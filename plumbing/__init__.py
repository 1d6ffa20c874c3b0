"""What no paper describes, a module a job. Each imports only those before it in tests/test_layout.py."""
