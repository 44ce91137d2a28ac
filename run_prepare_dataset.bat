@echo off
rem Turns a folder of pictures into a training set: run_prepare_dataset.bat --help
setlocal
cd /d "%~dp0"
set "python=python"
where /q py && set "python=py -3"
%python% scripts\start\set_up.py run_prepare_dataset %*
exit /b %errorlevel%
