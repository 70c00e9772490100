"""``python -m mlx_lora`` is ``mlx-lora``."""

from .cli.main import main

if __name__ == "__main__":
    main()
