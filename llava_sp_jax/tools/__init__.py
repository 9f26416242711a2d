"""The commands of `llava-sp`, one a file, each with a function `main(argv)`."""
