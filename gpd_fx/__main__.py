"""`python -m gpd_fx` is `gpd-fx`."""

from gpd_fx.cli import main

if __name__ == "__main__":
    main()
