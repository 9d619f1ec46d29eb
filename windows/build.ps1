# Builds dist\windows\flux.exe and flux-agent.exe on Windows (10 or later, Python 3.11 or later).
# On Linux use windows/build-wine.sh.
#
#   powershell -ExecutionPolicy Bypass -File windows\build.ps1
#
# $env:PYTHON names the interpreter, if it is not the `python` on the PATH.
$ErrorActionPreference = 'Stop'
Set-StrictMode -Version Latest

function Invoke-Checked {
    # Windows PowerShell does not stop at a program that fails.
    param([string]$Program, [string[]]$Arguments)
    & $Program @Arguments
    if ($LASTEXITCODE -ne 0) { throw "$Program $Arguments ended with $LASTEXITCODE" }
}

Set-Location (Split-Path -Parent $PSScriptRoot)
$base = if (Test-Path Env:PYTHON) { $Env:PYTHON } else { 'python' }
$venv = 'build\windows\venv'
$python = "$venv\Scripts\python.exe"

Invoke-Checked $base @('-m', 'venv', $venv)
Invoke-Checked $python @('-m', 'pip', 'install', '--quiet', '--require-hashes', '-r', 'requirements\build.txt')
Invoke-Checked $python @('windows\resources.py', 'build\windows')
Invoke-Checked $python @('-m', 'PyInstaller', '--noconfirm', '--log-level', 'WARN',
    '--distpath', 'dist\windows', '--workpath', 'build\windows\work', 'flux.spec')
Invoke-Checked 'dist\windows\flux.exe' @('--version')
Invoke-Checked 'dist\windows\flux-agent.exe' @('--version')
Get-ChildItem dist\windows\*.exe | Get-FileHash -Algorithm SHA256 | Format-List Path, Hash
