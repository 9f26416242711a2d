"""The commands of `llava-sp`, one a file; each has `main(argv)`."""
