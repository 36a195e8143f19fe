"""Each block of code in the README and the pages runs, or its title says why not. docs/deploy.md has its own test."""

import ast
import contextlib
import importlib
import inspect
import io
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
from pages import PAGES, ROOT, Fence, fences
from PIL import Image
from train_options import known_versions, load_options

import timm_atac
from timm_atac.cli import main
from timm_atac.cli.program import _parser
from timm_atac.weights.published import packaged_file

WITH_PYTHON = [page for page in PAGES if page.name != 'deploy.md' and any(f.language == 'python' for f in fences(page))]
WITH_SHELL = [page for page in PAGES if any(f.language == 'sh' for f in fences(page))]
RUN = ('docs/share.md', 'docs/gates.md')  # pages whose commands of timm-atac run here
OPTIONAL = {'sklearn': "needs the extra 'ablation'", 'torchvision': 'needs torchvision'}
TIMMS_SCRIPTS = ('train.py', 'validate.py')


def name(page: Path) -> str:
    return page.name


def is_run(fence: Fence) -> bool:
    return fence.language == 'python' and not fence.title


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with the files that blocks read. Weights that would be downloaded are left out."""
    monkeypatch.chdir(tmp_path)
    real = timm.create_model

    def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        packaged = packaged_file(f'{model_name}.cifar10')
        return real(model_name, pretrained=pretrained and bool(packaged or ':' in model_name), **kwargs)

    monkeypatch.setattr(timm, 'create_model', create_model)
    Image.effect_noise((64, 48), 90).convert('RGB').save('photo.jpg')
    shutil.copy('photo.jpg', 'cat.png')
    shutil.copy(ROOT / 'tests' / 'data' / 'cifar_b1_atac.params', 'FILE.params')
    Path('card.yaml').write_text('license: mit\n')
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('page', WITH_PYTHON, ids=name)
def test_python(page, folder) -> None:
    """The blocks of a page run one after the other, and print what the page says."""
    namespace: dict[str, Any] = {}
    for fence in filter(is_run, fences(page)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile('\n' * (fence.line - 1) + fence.code, page.name, 'exec'), namespace)
            except ModuleNotFoundError as error:
                if error.name not in OPTIONAL:
                    raise
                pytest.skip(OPTIONAL[error.name])
        if fence.output is not None:
            assert printed.getvalue() == fence.output, f'{page.name}, line {fence.line}'


@pytest.mark.parametrize('page', WITH_PYTHON, ids=name)
def test_arguments(page) -> None:
    """Functions of timm_atac exist and have the arguments that the blocks pass, also those that do not run."""
    for fence in fences(page):
        if fence.language == 'python':
            problems = [*unknown_arguments(ast.parse(fence.code))]
            assert not problems, f'{page.name}, line {fence.line}: {problems}'


def unknown_arguments(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith('timm_atac.'):
            continue
        function: Any = timm_atac
        for part in ast.unparse(node.func).split('.')[1:]:
            function = getattr(function, part)
        parameters = inspect.signature(function).parameters
        keywords = {keyword.arg for keyword in node.keywords} - {None}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            found += [f'{ast.unparse(node.func)} has no {keyword}' for keyword in keywords - parameters.keys()]
    return found


def test_an_unknown_argument_is_found() -> None:
    assert unknown_arguments(ast.parse('timm_atac.fuse(model, kernl=True)')) == ['timm_atac.fuse has no kernl']
    with pytest.raises(AttributeError):
        unknown_arguments(ast.parse('timm_atac.fus(model)'))


@pytest.mark.parametrize('page', WITH_SHELL, ids=name)
def test_shell(page) -> None:
    """Programs exist and have the options that the blocks give them."""
    for fence in fences(page):
        if fence.language == 'sh':
            for command in commands(fence.code):
                problem = problem_of(command)
                assert not problem, f'{page.name}, line {fence.line}: {shlex.join(command)}: {problem}'


def commands(code: str) -> list[list[str]]:
    """Return the simple commands of a script, without variables that are set before them."""
    found: list[list[str]] = []
    for line in code.replace('\\\n', ' ').splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars='&;')
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ';']:
            if set(word) <= set('&;'):
                found += [words] if words else []
                words = []
            elif words or not re.fullmatch(r'\w+=.*|\w+\(\)|[{}]', word):  # variables, and the frame of a function
                words.append(word)
    found = [words[: words.index('>')] if '>' in words else words for words in found]
    return [words[3:] if words[0] == 'nice' else words for words in found]


def problem_of(command: list[str]) -> str:
    """Return what is wrong with a command, '' if nothing is known to be."""
    program, *arguments = command
    program = program.removeprefix('.venv/bin/').removeprefix('.venv-oldest/bin/').removeprefix('.venv-newest/bin/')
    if program == 'timm-atac':
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.suppress(SystemExit):
            _parser().parse_args([word for word in arguments if word != '--help'])
        return errors.getvalue()
    if program == 'pip' or arguments[:2] == ['-m', 'pip']:
        extras = {extra for word in arguments for part in re.findall(r'\[(.*)\]', word) for extra in part.split(',')}
        text = (ROOT / 'pyproject.toml').read_text()
        return ', '.join(extra for extra in extras if f'\n{extra} = [' not in text)
    if program == 'pytest' or arguments[:2] == ['-m', 'pytest']:
        return ', '.join(word for word in arguments if '/' in word and not [*ROOT.glob(word)])
    if program.startswith('python') and arguments[:1] == ['-c']:
        compile(arguments[1], 'block', 'exec')
        return ''
    if program.startswith('python') and arguments[0].endswith('.py'):
        return problem_of_program(*arguments)
    known = ('git', 'cd', 'short', 'pre-commit', '.')
    return '' if program in known or arguments[:2] == ['-m', 'venv'] else 'a program that this test does not know'


def problem_of_program(program: str, *arguments: str) -> str:
    if program in TIMMS_SCRIPTS:
        known = {f'--{option.replace("_", "-")}' for option in load_options(known_versions()[-1])} | {'--config'}
        return ', '.join(word for word in arguments if word.startswith('--') and word not in known)
    path = ROOT / program
    if not path.is_file():
        return 'there is no such program'
    if path.name == 'stock.py':  # then come a program of timm and its arguments, perhaps after those of torchrun
        scripts = [i for i, word in enumerate(arguments) if word in TIMMS_SCRIPTS]
        return problem_of_program(*arguments[scripts[0] :]) if scripts else ''
    code = '\n'.join(file.read_text() for file in [path, *path.parent.glob('*/*.py')])
    options = {word.partition('=')[0] for word in arguments if word.startswith('--')}
    names = {option: option.replace('--no-', '--') for option in options}  # argparse.BooleanOptionalAction
    return ', '.join(option for option in options if not {f"'{option}'", f"'{names[option]}'"} & {*quoted(code)})


def quoted(code: str) -> list[str]:
    return re.findall(r"'--[\w-]+'", code)


@pytest.mark.parametrize(
    ('line', 'problem'),
    [
        ('timm-atac lst', 'invalid choice'),
        ('timm-atac gates a.png --modl x', "did you mean '--model'"),
        ("pip install '.[vis]'", 'vis'),
        ('pytest tests/no_such_file.py', 'tests/no_such_file.py'),
        ('.venv/bin/python train_scripts/ablation.py --actz relu', '--actz'),
        ('python benchmarks/spd.py', 'no such program'),
        ('python train.py --model-kwrgs a=1', '--model-kwrgs'),
        ('A=1 python train_scripts/stock.py torchrun --nnodes 2 train.py --confg a.yaml', '--confg'),
        ('frobnicate', 'does not know'),
    ],
)
def test_a_wrong_command_is_found(line, problem) -> None:
    (command,) = commands(line)
    assert problem in problem_of(command)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('page', RUN)
def test_commands_of_the_program(page, folder, capsys) -> None:
    importlib.import_module('timm_atac.gates.pictures')
    pytest.importorskip('matplotlib', reason="needs the extra 'viz'")
    count = 0
    for fence in fences(ROOT / page):
        for program, *arguments in commands(fence.code) if fence.language == 'sh' else ():
            if program == 'timm-atac' and arguments[0] != 'push':
                count += 1
                assert main(arguments) == 0, capsys.readouterr().err
    assert count >= 2


def test_titles() -> None:
    """A title gives a reason, and blocks without one are of a language that is tested."""
    for page in PAGES:
        for fence in fences(page):
            assert fence.language in ('python', 'sh', 'text', 'bibtex', ''), page
            assert re.match(r'Example: |Needs |Tested |The last |$', fence.title), fence.title
