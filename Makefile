# make demo: the whole pipeline on the sample clip; make test: the tests. Both set everything up first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint setup bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up, run the whole pipeline on the sample clip, print the path of report.html"
	@echo "make test    set up, run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make bench   measure the rasteriser on this machine"
	@echo "make clean   remove .venv (avatars in data/ stay)"

setup:
	@$(PYTHON) tools/bootstrap.py

demo: setup
	@$(BIN)/headcast demo

test: setup
	@$(BIN)/python -m pytest

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: setup
	@$(BIN)/headcast bench raster

clean:
	rm -rf .venv
