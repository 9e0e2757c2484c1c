"""python -m emformer"""

from emformer.cli import main

if __name__ == "__main__":
    main()
