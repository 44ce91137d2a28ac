@echo off
rem Sets up what is missing and runs the checks and tests: run_tests.bat --quick
setlocal
cd /d "%~dp0"
set "python=python"
where /q py && set "python=py -3"
%python% scripts\start\set_up.py run_tests %*
exit /b %errorlevel%
