"""`python -m gpd_fx` is `gpd-fx`."""

from gpd_fx.cli.app import main

if __name__ == "__main__":
    main()
