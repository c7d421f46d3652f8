"""What do the shells' completion scripts look like, around the words of launcher.completion?

A script finds the command on the line, then which kind of word belongs where the cursor is, then the words of it.
"""

from __future__ import annotations

BASH = r"""# bash completion of ghostmask. To install it, once per version:
#   ghostmask completion bash > ~/.local/share/bash-completion/completions/ghostmask
_ghostmask() {
    local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}"
    local command="" key="" kind="" kinds="" options="" list="" word i before="" seen=0
    COMPREPLY=()
    # readline takes key=value for three words
    if [[ $cur == "=" ]]; then key=$prev; cur=""; fi
    if [[ $prev == "=" ]]; then key="${COMP_WORDS[COMP_CWORD-2]}"; fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        word="${COMP_WORDS[i]}"
        if [[ $word == "=" || $before == "=" ]]; then before=$word; continue; fi
        _ghostmask_next
        before=$word
    done
    if [[ -n $key ]]; then _ghostmask_values; COMPREPLY=($(compgen -W "$list" -- "$cur")); return; fi
    _ghostmask_here
    case "$kind" in
        files) COMPREPLY=($(compgen -f -- "$cur")); compopt -o filenames ;;
        folders) COMPREPLY=($(compgen -d -- "$cur")); compopt -o filenames ;;
        *) for word in ${kind//+/ }; do
               list=""
               _ghostmask_words "$word"
               COMPREPLY+=($(compgen -W "$list" -- "$cur"))
               # Names of files are never given to -W, which would run what stands in them.
               [[ $word == configs ]] && mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -f -X '!*.yaml' -- "$cur")
               [[ $word == runs ]] && mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(
                   compgen -G "runs/$cur*/config.yaml" | sed 's|^runs/||; s|/config.yaml$||'
                   compgen -d -S / -- "$cur"
               )
           done
           [[ ${COMPREPLY[0]} == *[=/] ]] && compopt -o nospace ;;
    esac
    return 0
}
SHARED
complete -F _ghostmask ghostmask
"""

ZSH = r"""#compdef ghostmask
# zsh completion of ghostmask. To install it, once per version, before compinit in ~/.zshrc:
#   mkdir -p ~/.zfunc && ghostmask completion zsh > ~/.zfunc/_ghostmask; fpath=(~/.zfunc $fpath)
_ghostmask() {
    local cur="${words[CURRENT]}" prev="${words[CURRENT-1]}"
    local command="" key="" kind="" kinds="" options="" list="" word i before="" seen=0
    for ((i = 2; i < CURRENT; i++)); do
        word="${words[i]}"
        _ghostmask_next
        before=$word
    done
    if [[ $cur == *=* && $cur != -* ]]; then
        key="${cur%%=*}"
        _ghostmask_values
        compset -P '*='
        compadd -- ${=list}
        return
    fi
    _ghostmask_here
    case "$kind" in
        files) _files ;;
        folders) _files -/ ;;
        *) for word in ${(s:+:)kind}; do
               list=""
               _ghostmask_words "$word"
               compadd -S '' -- ${(M)${=list}:#*=}
               compadd -- ${${=list}:#*=}
               [[ $word == configs ]] && _files -g '*.yaml'
               [[ $word == runs ]] && { compadd -- runs/*/config.yaml(N:h:t); _files -/ }
           done ;;
    esac
    return 0
}
SHARED
if [[ $funcstack[1] == _ghostmask ]]; then _ghostmask "$@"; else compdef _ghostmask ghostmask; fi
"""

SHARED = r"""_ghostmask_next() {  # a whole word before the cursor: a command, an option, its value, an argument
    local wider="$command${command:+ }$word" name
    if [[ $word == -* ]]; then return; fi
    kind=""
    _ghostmask_taken "$command $before"
    if [[ -n $kind ]]; then kind=""; return; fi
    for name in NAMES; do
        if [[ $name == "$wider" ]]; then command=$wider; return; fi
    done
    seen=$((seen + 1))
}
_ghostmask_here() {  # kind: of the words that belong at the cursor
    local skip=$seen rest
    kind=""
    _ghostmask_taken "$command $prev"
    if [[ -n $kind ]]; then return; fi
    _ghostmask_command
    if [[ $cur == -* ]]; then kind="words:${options// /,}"; return; fi
    rest=$kinds
    while [[ $skip -gt 0 && $rest == *" "* ]]; do rest="${rest#* }"; skip=$((skip - 1)); done
    kind="${rest%% *}"
}
_ghostmask_command() {
    case "$command" in
        # ARGUMENTS
    esac
    case "$command" in
        # OPTIONS
    esac
}
_ghostmask_taken() {
    case "$1" in
        # TAKEN
    esac
}
_ghostmask_words() {
    case "$1" in
        words:*) list="${1#words:}"; list="${list//,/ }" ;;
        # WORDS
    esac
}
_ghostmask_values() {
    case "$key" in
        # VALUES
    esac
}"""
"""In the place of SHARED, of bash and zsh: they differ in how they look at the line and give words back."""

FISH = r"""# fish completion of ghostmask. To install it, once per version:
#   ghostmask completion fish > ~/.config/fish/completions/ghostmask.fish
# LISTS
function __ghostmask_at  # whether the command on the line is this one
    set -l command
    for word in (commandline -opc)[2..]
        string match -q -- '-*' $word; and continue
        set -l wider (string trim "$command $word")
        contains -- $wider NAMES; and set command $wider
    end
    test "$command" = "$argv"
end
function __ghostmask_runs
    for file in runs/*/config.yaml
        string replace -r '^runs/(.*)/config.yaml$' '$1' $file
    end
    __fish_complete_directories
end
complete -c ghostmask -f
"""
