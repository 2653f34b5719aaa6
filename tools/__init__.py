"""What else can be done here than train? A tool is a file of this folder with main(argv); `python tools` lists them."""
