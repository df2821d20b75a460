from pcnn_lightning.cli import main

main()
